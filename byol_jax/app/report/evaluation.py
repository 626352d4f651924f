"""What --mode=evaluate measured, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Metrics that are no shares, and how they are printed.
_PLAIN = {'feature_std': '.4f', 'rankme': '.1f', 'kmeans_nmi': '.3f'}


def evaluation_text(evaluation: Mapping[str, Any]) -> str:
    """The table of an evaluation: a line for each metric, and for each that could not be measured.

    Args:
      evaluation: the contents of an evaluation.json.
    """
    data, metrics = evaluation['data'], evaluation['metrics']
    names = [*metrics, *evaluation['not_measured']]
    width = max(map(len, names))
    tested = f', {data["queries"]:,} {data["queries_are"]}' if data['queries'] else ''
    labels = f', {data["labels"]:,} labels' if data['labels'] else ', no labels'
    lines = [
        f'{evaluation["encoder"]} (step {evaluation["step"]}): '
        f'{data["training"]:,} training{tested} pictures{labels}'
    ]
    for name, value in metrics.items():
        shown = f'{value:{_PLAIN[name]}}' if name in _PLAIN else f'{value:.1%}'
        lines.append(f'  {name:<{width}}  {shown:>8}  {_explained(name, evaluation)}')
    for name, why in evaluation['not_measured'].items():
        lines.append(f'  {name:<{width}}  {"-":>8}  not measured: {why}')
    for note in evaluation['notes']:
        lines.append(note)
    return '\n'.join(lines)


def _explained(name: str, evaluation: Mapping[str, Any]) -> str:
    """What a number is, in a few words."""
    protocols = evaluation['protocols']
    if name.startswith('knn_'):
        temperature = protocols['knn']['temperature']
        return f'accuracy, vote of the {name[4:]} nearest training pictures, T={temperature:g}'
    if name.startswith('recall_'):
        about = protocols['retrieval']
        k, pool = int(name[7:]), about['pool']
        chance = f'{about["chance"][name]:.1%}'
        found = 'nearest' if k == 1 else f'among the {k} nearest'
        return f'other view {found}, in a pool of {pool:,} {about["of"]} pictures; chance {chance}'
    protocol, _, top5 = name.partition('_top5')
    accuracy = 'top-5 accuracy' if top5 or name.endswith('_top5') else 'accuracy'
    if protocol == 'linear':
        about = protocols['linear']
        return f'{accuracy}, SGD on random crops, learning rate {about["learning_rate"]:g} chosen'
    if protocol in ('probe', 'ridge'):
        penalty = protocols[protocol]['penalty']
        method = 'logistic regression' if protocol == 'probe' else 'ridge regression'
        return f'{accuracy}, {method} on centre crops, penalty {penalty:g} chosen'
    if name == 'kmeans_nmi':
        about = protocols['kmeans']
        return (
            f'mutual information of {about["clusters"]:,} clusters of the {about["pictures"]:,} '
            f'{about["of"]} pictures with their labels, 0 to 1'
        )
    about = protocols['spectrum']
    if name == 'feature_std':
        return f'at unit length; at most {about["feature_size"] ** -0.5:.4f}, 0 is collapse'
    most = min(about['rankme_pictures'], about['feature_size'])
    return f'directions in use, of at most {most:,}'
