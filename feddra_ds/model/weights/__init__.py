"""Initial weights one at a time: a model is built without them (deferred.py), and each is drawn or read when asked for."""
