"""A GPT-2 on the lab's attention: the model, its loss, its texts, and how fast it runs.

attention        registers the lab's kernels with transformers, under the names "labutils" and "labutils_v1"
models           makes a GPT-2 with random weights, or loads trained ones
rope             gives it rotary positions
loss             the loss of a batch, whole or in chunks, and of each token by its position
texts            long texts that are on every machine
packing          a tokenizer, sequences of equal length, batches
model_benchmark  times and memory of a whole model under each attention
"""
