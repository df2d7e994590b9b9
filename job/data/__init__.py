"""The data side of the job: files -> rows -> conversations -> token ids and labels. No network, no torch.

`files` (with `lines` and `blocks`) reads rows, `shapes` makes examples of them, `render` and `tokens` make token ids
and labels, `prepare` does it for a whole data set, and `split` chooses lengths and rows.
"""

from job.data.files import is_readable
from job.data.prepare import TokenizedData, tokenize_files
from job.data.shapes import LossOn, Shape
from job.data.split import Selection, Truncation, choose_max_length, select_rows, split_rows
from job.data.tokens import NOT_SUPERVISED, load_tokenizer

__all__ = [
    "NOT_SUPERVISED",
    "LossOn",
    "Selection",
    "Shape",
    "TokenizedData",
    "Truncation",
    "choose_max_length",
    "is_readable",
    "load_tokenizer",
    "select_rows",
    "split_rows",
    "tokenize_files",
]
