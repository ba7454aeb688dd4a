"""The timing protocol that tuner, command line and tests share, and the benchmark built on it."""

from gdn2gen._bench_accuracy import (
    ERROR_NAMES,
    inputs_of,
    relative_errors,
    run_op,
    run_reference,
)
from gdn2gen._bench_results import (
    check_saveable,
    read_results,
    rows_document,
    rows_table,
    save_results,
)
from gdn2gen._bench_rows import Row, StageRow, bench_shapes, bench_stages
from gdn2gen._bench_time import (
    Timing,
    copy_gbps,
    floor_ms,
    peak_mib,
    symbol_sizes,
    time_ms,
)
from gdn2gen.floor import floor_bytes

__all__ = [
    "ERROR_NAMES",
    "Row",
    "StageRow",
    "Timing",
    "bench_shapes",
    "bench_stages",
    "check_saveable",
    "copy_gbps",
    "floor_bytes",
    "floor_ms",
    "inputs_of",
    "peak_mib",
    "read_results",
    "relative_errors",
    "rows_document",
    "rows_table",
    "run_op",
    "run_reference",
    "save_results",
    "symbol_sizes",
    "time_ms",
]
