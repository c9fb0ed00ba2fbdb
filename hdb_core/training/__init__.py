"""Training of the hypernetwork on a diffusers base model. Users of the nodes never need this package."""
