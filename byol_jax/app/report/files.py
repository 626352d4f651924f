"""evaluation.json and results.json: whether an object is one of these."""

from __future__ import annotations

from typing import Any


def is_evaluation(content: Any) -> bool:
    """Whether an object has the measures of an evaluation, as far as pages and tables use them."""
    return (
        isinstance(content, dict)
        and isinstance(content.get('metrics'), dict)
        and all(map(_is_number, content['metrics'].values()))
        and _is_number(content.get('step', 0))
        and isinstance(content.get('shown', {}), dict)
        and all(isinstance(form, str) for form in content.get('shown', {}).values())
        and isinstance(content.get('encoder', ''), str)
    )


def is_results(content: Any) -> bool:
    """Whether an object is a before/after table."""
    rows = content.get('results') if isinstance(content, dict) else None
    return (
        isinstance(rows, list)
        and isinstance(content.get('protocol', ''), str)
        and all(_is_row(row) for row in rows)
    )


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get('name'), str)
        and (row.get('accuracy') is None or _is_number(row['accuracy']))
        and _is_number(row.get('feature_std'))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
