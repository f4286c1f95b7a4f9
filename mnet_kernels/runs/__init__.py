"""Several layers of a model in one operator call: a *run* of them, or a depthwise + 1x1 pair."""
