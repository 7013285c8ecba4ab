"""Methods of many masks on a GPU: masks, forwards and sums stay on the device."""
