"""--mode=evaluate: its numbers against scikit-learn and NumPy, and its messages."""

from __future__ import annotations

import json
import math
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from encoders import SIZE, evaluation_request, save_random_encoder, write_pictures
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from streams import view_of
from torchvision_reference import random_weights, torchvision_shapes

from byol_jax import UserError, load_encoder
from byol_jax.app.data import build_data
from byol_jax.app.evaluate import evaluation_text
from byol_jax.app.fingerprint import fingerprint
from byol_jax.app.modes import MODES
from byol_jax.evaluation.probes import held_out_rows
from byol_jax.evaluation.protocols import PROTOCOLS
from byol_jax.input.stream import epoch_order
from byol_jax.interop.torchvision import load_torchvision
from byol_jax.views.recipes import crop_and_flip, paper_views

TRAIN = {'bird': 18, 'cat': 24, 'dog': 21}
TEST = {'cat': 13, 'dog': 11, 'bird': 9}
SEED = 3
RATES = (0.4, 0.05)
EPOCHS, BATCH = 3, 16


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with encoder/, train/ and test/."""
    folder = tmp_path_factory.mktemp('evaluate')
    save_random_encoder(folder / 'encoder')
    write_pictures(folder / 'train', TRAIN, 0)
    write_pictures(folder / 'test', TEST, 1)
    return folder


def run(place, output, **changes):
    """Runs the mode on train/ or another path, and returns the evaluation that it writes."""
    given = {'data__path': str(place / 'train')} | changes
    request = evaluation_request(place / 'encoder', output.parent / 'w', output, **given)
    MODES['evaluate'](request)
    return json.loads(output.read_text())


@pytest.fixture(scope='module')
def evaluation(place):
    """The evaluation with all protocols, on a separate test set."""
    return run(
        place,
        place / 'all.json',
        seed=SEED,
        evaluate__data_path=str(place / 'test'),
        evaluate__protocols=tuple(PROTOCOLS),
        evaluate__knn_k=(5, 20, 200),
        evaluate__linear_learning_rates=RATES,
        evaluate__linear_epochs=EPOCHS,
        evaluate__linear_batch_size=BATCH,
        evaluate__retrieval_pool=20,
    )


@pytest.fixture(scope='module')
def embedded(place):
    """(features, labels) of both sets from --mode=embed, labels numbered by the sorted names."""
    found = []
    for name in ('train', 'test'):
        path = place / f'{name}.npz'
        data = {'data__path': str(place / name)}
        MODES['embed'](evaluation_request(place / 'encoder', place / 'w', path, **data))
        with np.load(path) as arrays:
            labels = [name.split('/')[0] for name in arrays['names']]
            found.append((arrays['features'], np.searchsorted(sorted(TRAIN), labels)))
    return found


@pytest.mark.parametrize('k', [5, 20])
def test_knn(evaluation, embedded, k):
    """The weighted vote equals scikit-learn's on the embeddings, for each k."""
    (train, labels), (test, truth) = embedded
    reference = KNeighborsClassifier(
        k, metric='cosine', algorithm='brute', weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(train, labels)
    accuracy = evaluation['metrics'][f'knn_{k}']
    assert accuracy == pytest.approx(reference.score(test, truth))
    assert 0.4 < accuracy < 1


def test_k_above_the_gallery(evaluation):
    """A k larger than the number of pictures has no result, and a reason."""
    assert 'knn_200' not in evaluation['metrics']
    assert '63 training pictures, fewer than 200' in evaluation['not_measured']['knn_200']


def test_probes(evaluation, embedded):
    """Logistic and ridge regression at the chosen penalty give scikit-learn's answers."""
    (train, labels), (test, truth) = embedded
    train, test = ((x - train.mean(0)) / train.std(0) for x in (train, test))
    about = evaluation['protocols']
    logistic = LogisticRegression(C=1 / about['probe']['penalty'], max_iter=10_000, tol=1e-8)
    expected = logistic.fit(train, labels).score(test, truth)
    assert evaluation['metrics']['probe'] == pytest.approx(expected)
    ridge = Ridge(about['ridge']['penalty']).fit(train, np.eye(3)[labels])
    expected = np.mean(ridge.predict(test).argmax(axis=1) == truth)
    assert evaluation['metrics']['ridge'] == pytest.approx(expected)
    held = about['probe']['held_out_accuracy']
    assert held[f'{about["probe"]["penalty"]:g}'] == max(held.values())
    assert about['probe']['chosen_on'] == 2 + 2 + 2


def test_clusters(evaluation, embedded):
    """The mutual information of clusters and labels equals scikit-learn's."""
    features, truth = embedded[1]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    clusters = KMeans(3, n_init=10, random_state=SEED).fit(unit).labels_
    expected = normalized_mutual_info_score(truth, clusters)
    assert evaluation['metrics']['kmeans_nmi'] == pytest.approx(expected, abs=1e-6)


def test_spectrum(evaluation, embedded):
    """Feature std and RankMe are those of the training embeddings."""
    features = embedded[0][0].astype(np.float64)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert evaluation['metrics']['feature_std'] == pytest.approx(unit.std(axis=0).mean())
    sigma = np.linalg.svd(features, compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert evaluation['metrics']['rankme'] == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def read(place, part):
    """The pictures of train/ or test/ in the order of their paths, with their labels."""
    files = sorted((place / part).glob('*/*.png'))
    labels = np.searchsorted(sorted(TRAIN), [file.parent.name for file in files])
    return [np.asarray(Image.open(file)) for file in files], labels


def test_retrieval(evaluation, place):
    """The other view is nearest, within the stated pool, as often as a full search finds."""
    pictures, _ = read(place, 'test')
    pool = epoch_order(SEED, 0, 33)[:20]
    features = []
    for number, view in enumerate(paper_views(SIZE).values(), 1):
        made = [
            view_of(view, pictures[i], seed=SEED, epoch=0, example=int(i), number=number)
            for i in pool
        ]
        features.append(load_encoder(place / 'encoder')(np.stack(made)).astype(np.float64))
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in features)
    order = np.argsort(-one @ two.T, axis=1)
    for k in (1, 5):
        expected = np.mean([i in order[i, :k] for i in range(20)])
        assert evaluation['metrics'][f'recall_{k}'] == pytest.approx(expected)
    about = evaluation['protocols']['retrieval']
    assert (about['pool'], about['of'], about['chance']['recall_5']) == (20, 'test', 0.25)


def test_linear(evaluation, embedded, place):
    """SGD in NumPy on new crops and flips in every epoch chooses and scores the same."""
    pictures, labels = read(place, 'train')
    view, encoder = crop_and_flip(paper_views(SIZE)['view1']), load_encoder(place / 'encoder')
    held = held_out_rows(labels, seed=SEED)
    rows = np.flatnonzero(~held)
    x, y = [], []
    for epoch in range(EPOCHS):
        for i in epoch_order(SEED, epoch, len(rows)):
            own = {'seed': SEED, 'epoch': epoch, 'example': int(i), 'number': 1}
            x.append(view_of(view, pictures[rows[i]], **own))
            y.append(labels[rows[i]])
    x, y = encoder(np.stack(x)), np.array(y)
    start = jax.random.truncated_normal(jax.random.key(SEED), -2, 2, (8, 3)) / math.sqrt(8)
    steps = len(y) // BATCH
    accuracies, tested = {}, {}
    for rate in RATES:
        w = np.vstack([np.asarray(start, np.float64), np.zeros(3)])
        trace = np.zeros_like(w)
        for step in range(steps):
            part = slice(step * BATCH, (step + 1) * BATCH)
            inputs = np.hstack([x[part], np.ones((BATCH, 1))])
            scores = inputs @ w
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            grad = inputs.T @ (p - np.eye(3)[y[part]]) / BATCH
            trace = 0.9 * trace + grad
            peak = rate * BATCH / 256 * 0.5 * (1 + math.cos(math.pi * step / steps))
            w -= peak * (grad + 0.9 * trace)
        for score, (features, truth) in (
            (accuracies, (embedded[0][0][held], labels[held])),
            (tested, embedded[1]),
        ):
            score[rate] = np.mean((features @ w[:-1] + w[-1]).argmax(axis=1) == truth)
    about = evaluation['protocols']['linear']
    assert about['held_out_accuracy'] == pytest.approx({f'{r:g}': a for r, a in accuracies.items()})
    chosen = max(accuracies, key=accuracies.get)
    assert about['learning_rate'] == chosen
    assert evaluation['metrics']['linear'] == pytest.approx(tested[chosen])
    assert (about['steps'], about['trained_on']) == (steps, len(rows))


def test_what_is_written(evaluation, place, capsys):
    """The file says what was measured on what, with which options, and how long it took."""
    encoder = load_encoder(place / 'encoder')
    assert evaluation['encoder'] == str(place / 'encoder')
    assert (evaluation['weights_sha256'], evaluation['step']) == (encoder.weights_sha256, 7)
    data = evaluation['data']
    assert (data['training'], data['queries'], data['queries_are']) == (63, 33, 'test')
    assert (data['labels'], data['test_path']) == (3, str(place / 'test'))
    assert set(evaluation['protocols']) == set(PROTOCOLS)
    assert all(about['seconds'] >= 0 for about in evaluation['protocols'].values())
    assert evaluation['options']['evaluate']['linear_epochs'] == EPOCHS
    assert evaluation['options']['image_size'] == SIZE
    assert evaluation['bad_files'] == []
    assert evaluation['notes'] == ['33 test pictures give only a rough figure.']
    assert {'byol_jax', 'jax', 'scikit-learn'} <= set(evaluation['versions'])


def test_the_table(place, tmp_path, capsys):
    """One line for each result and for each that is missing; the last line names the file."""
    found = run(place, tmp_path / 'e.json', data__held_out_fraction=0.3, evaluate__knn_k=(5, 99))
    said = capsys.readouterr().out
    assert 'encoder (step 7): 45 training, 18 held-out pictures, 3 labels' in said
    assert f'knn_5   {found["metrics"]["knn_5"]:>8.1%}  accuracy, vote of the 5 nearest' in said
    assert 'knn_99         -  not measured: there are only 45 training pictures' in said
    assert said.splitlines()[-1] == f'evaluation: {tmp_path / "e.json"}'


def test_no_labels(place, tmp_path, capsys):
    """Pictures without labels are measured by the protocols that need none."""
    flat = write_pictures(tmp_path / 'flat', {'': 20}, 2)
    given = {'evaluate__protocols': tuple(PROTOCOLS), 'data__held_out_fraction': 0.4}
    found = run(place, tmp_path / 'e.json', data__path=str(flat), **given)
    assert set(found['metrics']) == {'feature_std', 'rankme', 'recall_1', 'recall_5'}
    assert found['protocols']['retrieval']['pool'] == 8
    assert set(found['not_measured']) == {'knn_5', 'linear', 'probe', 'ridge', 'kmeans_nmi'}
    assert 'have no labels' in found['not_measured']['linear']
    assert (found['data']['labels'], found['data']['queries']) == (0, 8)
    assert 'not measured: the data have no labels' in capsys.readouterr().out


def test_nothing_held_out(place, tmp_path):
    """Without test pictures, protocols that need them say so; clusters use training pictures."""
    found = run(place, tmp_path / 'e.json', evaluate__protocols=('knn', 'kmeans', 'retrieval'))
    assert 'nothing to test on' in found['not_measured']['knn_5']
    about = found['protocols']
    assert (about['kmeans']['of'], about['kmeans']['pictures']) == ('training', 63)
    assert (about['retrieval']['of'], about['retrieval']['pool']) == ('training', 63)


def test_one_label(place, tmp_path):
    """If all pictures have one label, every answer is right, so there is no accuracy."""
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), np.uint8)
    path = tmp_path / 'one.npz'
    np.savez(path, images=images, labels=np.zeros(12, int), label_names=np.array(['cat']))
    given = {'data__source': 'array', 'data__path': str(path), 'data__held_out_fraction': 0.5}
    chosen = ('knn', 'kmeans', 'spectrum')
    found = run(place, tmp_path / 'e.json', **given, evaluate__protocols=chosen)
    assert set(found['metrics']) == {'feature_std', 'rankme'}
    for name in ('knn_5', 'kmeans_nmi'):
        assert found['not_measured'][name] == "all pictures have the same label 'cat'"


def test_nothing_to_measure(place, tmp_path):
    """It is an error if no requested protocol can be measured, and nothing is written."""
    with pytest.raises(UserError, match=r'Nothing of evaluate\.protocols.*nothing to test on'):
        run(place, tmp_path / 'e.json')
    assert not list(tmp_path.iterdir())


def test_too_few_to_hold_out(place, tmp_path):
    """With one training picture for each label, none is left to choose a penalty."""
    few = write_pictures(tmp_path / 'few', {'cat': 1, 'dog': 1}, 0)
    test = write_pictures(tmp_path / 'test', {'cat': 2, 'dog': 2}, 1)
    given = {'data__path': str(few), 'evaluate__data_path': str(test)}
    found = run(place, tmp_path / 'e.json', **given, evaluate__protocols=('probe', 'spectrum'))
    assert 'no class has two images' in found['not_measured']['probe']


def test_bad_pictures(place, tmp_path, capsys):
    """Unreadable pictures are left out of both sets, counted and named."""
    train = write_pictures(tmp_path / 'train', {'cat': 9, 'dog': 9}, 0)
    test = write_pictures(tmp_path / 'test', {'cat': 9, 'dog': 9}, 1)
    (train / 'cat' / '03.png').write_bytes(b'')
    (test / 'dog' / '05.png').write_text('no picture')
    given = {'data__path': str(train), 'evaluate__data_path': str(test)}
    chosen = ('knn', 'retrieval')
    found = run(place, tmp_path / 'e.json', **given, evaluate__protocols=chosen)
    assert (found['data']['training'], found['data']['queries']) == (17, 17)
    assert found['protocols']['retrieval']['pool'] == 17
    files = [bad['file'] for bad in found['bad_files']]
    assert files == [str(train / 'cat' / '03.png'), str(test / 'dog' / '05.png')]
    assert found['bad_files'][0]['reason'] == 'is empty'
    assert f'2 bad file(s) left out: {files[0]} is empty' in capsys.readouterr().out


def test_an_encoder_that_is_not_finite(place, tmp_path):
    """NaN features are reported, with the picture they belong to."""
    broken = save_random_encoder(tmp_path / 'encoder', broken=True)
    request = evaluation_request(broken, tmp_path / 'w', data__path=str(place / 'train'))
    with pytest.raises(UserError, match=r'63 of 63 pictures hold NaN .*bird/00\.png'):
        MODES['evaluate'](request)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (
            {'evaluate__protocols': ('knn', 'liner')},
            r"'liner' is not a known protocol.*mean 'linear'",
        ),
        ({'evaluate__protocols': ()}, 'measures nothing'),
        ({'evaluate__knn_k': (0,)}, r'knn_k=\(0,\) must be different numbers above 0'),
        ({'evaluate__linear_learning_rates': (0.1, 0.1)}, 'must be different numbers above 0'),
        ({'evaluate__linear_epochs': 0}, 'linear_epochs=0 must be at least 1'),
    ],
    ids=['protocol', 'none', 'k', 'rates', 'epochs'],
)
def test_options_that_cannot_be(place, tmp_path, changes, words):
    """A useless option is named before anything is opened."""
    with pytest.raises(UserError, match=words):
        run(place, tmp_path / 'e.json', data__path='/nowhere', **changes)


def test_another_held_out_part_is_said(place, tmp_path):
    """A note says so if the encoder's run may have trained on test pictures."""
    run_folder = tmp_path / 'run'
    encoder = save_random_encoder(run_folder / 'encoder')
    given = {'data__path': str(place / 'train'), 'data__held_out_fraction': 0.3}
    request = evaluation_request(encoder, run_folder, **given)
    kept = fingerprint(build_data(request.config))

    def notes(data):
        (run_folder / 'data.json').write_text(json.dumps(data))
        MODES['evaluate'](request)
        notes = json.loads((run_folder / 'evaluation.json').read_text())['notes']
        return [note for note in notes if 'trained on' in note]

    assert notes(kept) == []
    assert notes({**kept, 'examples': 5, 'held_out': 3}) == [], 'other data'
    moved = {**kept, 'examples': kept['examples'] + 2, 'held_out': kept['held_out'] - 2}
    assert 'command.txt' in notes(moved)[0]


def test_where_it_is_written(place, tmp_path):
    """By default into the workdir, but never over another encoder's evaluation."""
    given = {'data__path': str(place / 'train'), 'data__held_out_fraction': 0.3}
    MODES['evaluate'](evaluation_request(place / 'encoder', tmp_path / 'w', **given))
    assert [p.name for p in (tmp_path / 'w').iterdir()] == ['evaluation.json']
    MODES['evaluate'](evaluation_request(place / 'encoder', tmp_path / 'w', **given))
    other = save_random_encoder(tmp_path / 'other', broken=True)
    before = (tmp_path / 'w' / 'evaluation.json').read_bytes()
    with pytest.raises(UserError, match=r'evaluation of another encoder, .*--output=FILE\.json'):
        MODES['evaluate'](evaluation_request(other, tmp_path / 'w', **given))
    assert (tmp_path / 'w' / 'evaluation.json').read_bytes() == before
    (tmp_path / 'w' / 'evaluation.json').write_text('mine')
    with pytest.raises(UserError, match=r'is no evaluation, so it is not replaced'):
        MODES['evaluate'](evaluation_request(place / 'encoder', tmp_path / 'w', **given))
    (tmp_path / 'w' / 'config.json').write_text('{}')
    with pytest.raises(UserError, match=r'belongs to a run .*--output=FILE\.json'):
        MODES['evaluate'](evaluation_request(place / 'encoder', tmp_path / 'w', **given))
    with pytest.raises(UserError, match=r'ends in \.json'):
        run(place, tmp_path / 'e.npz')


@pytest.mark.parametrize('mode', ['evaluate', 'embed'])
def test_an_encoder_of_another_project(place, tmp_path, monkeypatch, capsys, mode):
    """--encoder=torchvision:FILE measures and embeds weights without exporting them first; where
    they were found in the file is printed, and ~ is the home folder."""
    monkeypatch.setenv('HOME', str(tmp_path))
    weights = random_weights(torchvision_shapes('resnet18', 1 / 16, True))
    prefixed = {f'module.encoder_q.{name}': array for name, array in weights.items()}
    safetensors.numpy.save_file(prefixed, tmp_path / 'moco.safetensors')
    encoder = load_torchvision(tmp_path / 'moco.safetensors')
    source = 'torchvision:~/moco.safetensors'
    given = {'data__path': str(place / 'train'), 'data__held_out_fraction': 0.3}
    MODES[mode](evaluation_request(source, tmp_path / 'w', **given))
    out = capsys.readouterr().out
    assert "moco.safetensors: the ResNet is under 'module.encoder_q.'" in out
    if mode == 'evaluate':
        found = json.loads((tmp_path / 'w' / 'evaluation.json').read_text())
        assert (found['encoder'], found['weights_sha256']) == (source, encoder.weights_sha256)
    else:
        with np.load(tmp_path / 'w' / 'embeddings.npz') as arrays:
            assert arrays['features'].shape == (63, 32)


def test_metrics_of_another_version_are_shown():
    """A metric that the file says nothing about but its value is shown without an explanation."""
    there = {
        'encoder': 'e',
        'step': 3,
        'data': {'training': 5, 'queries': 0, 'queries_are': 'test', 'labels': 0},
        'metrics': {'knn_5': 0.25, 'new_metric': 1.5},
        'shown': {'knn_5': '.1%'},
        'explained': {'knn_5': 'accuracy'},
        'not_measured': {},
        'notes': [],
    }
    for missing in ({}, {'shown': {}}, {'explained': {}}):
        text = evaluation_text({**there, **missing})
        assert re.search(r'new_metric +1\.5$', text, re.MULTILINE)
