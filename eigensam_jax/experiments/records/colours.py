"""The colours of methods, the same in all plots."""

COLOURS = {
    "sgd": "#7f7f7f",
    "sam": "#1f77b4",
    "asam": "#9467bd",
    "eigen_sam_paper": "#ff7f0e",
    "sam_matched_paper": "#bcbd22",
    "eigen_sam": "#d62728",
    "sam_matched": "#17becf",
}
