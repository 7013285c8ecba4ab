"""How good maps are: metrics, data sets, and the evaluation of methods on them."""
