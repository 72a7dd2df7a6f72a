"""What fits, trains and calibrates on: texts, the model's own continuations, splits that share no document."""

from dyndepth.data.corpus import FIT, TEST, TUNE, Corpus, collect, deal
from dyndepth.data.encode import check_ids, document, encode
from dyndepth.data.files import read_texts
from dyndepth.data.gather import encoded, gather
from dyndepth.data.own import continuations
from dyndepth.data.own_prompts import own_prompts
from dyndepth.data.pieces import TEXT_PIECE, Piece, openings, sections, text_pieces

__all__ = [
    "FIT",
    "TEST",
    "TEXT_PIECE",
    "TUNE",
    "Corpus",
    "Piece",
    "check_ids",
    "collect",
    "continuations",
    "deal",
    "document",
    "encode",
    "encoded",
    "gather",
    "openings",
    "own_prompts",
    "read_texts",
    "sections",
    "text_pieces",
]
