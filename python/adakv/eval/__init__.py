"""What a policy costs in quality: metrics on any model, and the page that shows one prompt.

data.py      files -> items: a prompt that is compressed, a query and an answer
chat.py      a text and a question -> the tokens of a prompt
prefill.py   one forward over a prompt, from which any number of caches is filled
metrics.py   logits of the full and of a compressed cache -> KL, agreement, exact, loss
answers.py   the full cache's answer, and how near other caches come to it
runner.py    every item x policy x share -> records, one JSON line each
processes.py the same by several processes
summary.py   records -> means with standard errors, paired comparison, table, JSON
plot.py      records -> curves of quality against bytes
page.py      one prompt -> HTML, Markdown and PNG: what was kept, and where
comparison.py one question, several policies -> a table
lm.py        a model class for lm-eval
"""
