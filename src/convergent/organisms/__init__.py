"""Organisms: recipes, training, loading.

`recipes.py` says what is trained, `chats.py` makes rows of tokens of the data, `train.py` trains, `manifest.py` is what it writes
down, `load.py` brings an organism of ours or anybody's PEFT folder back as a chat model. Knows nothing of questions, judges or directions.
"""
