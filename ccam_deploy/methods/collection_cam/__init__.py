"""Collection-CAM (Ha & Youn, IEEE Access 2022), on the CPU and on a GPU."""
