"""Do the graphs of a bundle compute what the model computed?"""
