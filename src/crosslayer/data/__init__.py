"""Text in, packed blocks of tokens out.

    prepared = prepare_data(DataConfig(data="python-library", block_size=256))
    prepared.train[0]          # {"input_ids": [256 ints], "position_ids": [...], "labels": [...]}

A source (the embedded Python library, files, folders, hub datasets) becomes documents, documents are split
by hash into training and validation, tokenised, packed into fixed blocks and cached on disk. Tasks to
fine-tune on (`tasks.py`) keep their rows and columns. Importing
this package is cheap: `datasets` and `transformers` are imported when a function needs them.
"""

from .config import DataConfig
from .packing import IGNORE_INDEX, SplitStatistics
from .prepare import DataStatistics, PreparedData, load_documents, load_evaluation_data, prepare_data, prepare_folder
from .tasks import Task, TaskConfig, load_task
from .tokenizer import document_end_id, document_start_id, load_tokenizer, padding_id, train_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "DataConfig",
    "DataStatistics",
    "PreparedData",
    "SplitStatistics",
    "Task",
    "TaskConfig",
    "document_end_id",
    "document_start_id",
    "load_documents",
    "load_evaluation_data",
    "load_task",
    "load_tokenizer",
    "padding_id",
    "prepare_data",
    "prepare_folder",
    "train_tokenizer",
]
