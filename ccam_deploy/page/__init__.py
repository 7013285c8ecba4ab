"""A page to look at explanations in a browser: `ccam-deploy demo`."""
