"""The extension points of transformers that this project uses, one file each.

Only the code in this package registers hooks. A hook is registered once per model, looks up the
request that is active in its own thread, and returns None when there is none: the model is then
bit-identical to the stock model.
"""
