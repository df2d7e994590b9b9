"""The data side of the job: files -> rows -> examples -> token ids and labels. No network, no torch.

`reading` makes rows of files, `shaping` examples of rows, and `encoding` token ids and labels of examples. `prepare`
does it for a whole data set: `pool` shares out the chunks of its files, `encode_chunk` is the work on each, `bad_rows`
and `statistics` take account, `cache` keeps the result. Then `split` chooses lengths and rows, `turn_end` compares what
the rows end in with what generation stops at, and `xray` shows what is learned.
"""

from job.data.encoding.chat_template import (
    SHIPPED_NAMES,
    AppliedTemplate,
    ChatTemplate,
    NewToken,
    apply_template,
    clone_template,
    read_template_file,
    shipped_template,
)
from job.data.encoding.render import find_template
from job.data.encoding.tokens import NOT_SUPERVISED, load_tokenizer
from job.data.pool import Encoders
from job.data.prepare import TokenizedData, tokenize_files
from job.data.reading.files import SourceFile, is_readable
from job.data.shaping.shapes import LossOn, RowFormat, RowOptions, Shape, check_options
from job.data.split import (
    Integers,
    Selection,
    Truncation,
    choose_max_length,
    count_copies,
    find_duplicates,
    select_rows,
    split_rows,
)
from job.data.turn_end import TurnEnd, adopt_turn_end
from job.data.xray import Lengths, Piece, XRay

__all__ = [
    "NOT_SUPERVISED",
    "SHIPPED_NAMES",
    "AppliedTemplate",
    "ChatTemplate",
    "Encoders",
    "Integers",
    "Lengths",
    "LossOn",
    "NewToken",
    "Piece",
    "RowFormat",
    "RowOptions",
    "Selection",
    "Shape",
    "SourceFile",
    "TokenizedData",
    "Truncation",
    "TurnEnd",
    "XRay",
    "adopt_turn_end",
    "apply_template",
    "check_options",
    "choose_max_length",
    "clone_template",
    "count_copies",
    "find_duplicates",
    "find_template",
    "is_readable",
    "load_tokenizer",
    "read_template_file",
    "select_rows",
    "shipped_template",
    "split_rows",
    "tokenize_files",
]
