"""Organisms: recipes, training, loading.

`recipes.py` says what is trained, `train.py` trains it, `manifest.py` is what it writes down, `load.py` brings an organism of ours
or anybody's PEFT folder back as a chat model. Knows nothing of questions, judges or directions.
"""
