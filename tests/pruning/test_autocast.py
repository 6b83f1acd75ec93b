"""Scores are float32 under autocast too."""

from __future__ import annotations

import torch

from mmlm_efficient.prepare import LMMParts, prepare
from mmlm_efficient.pruning import FlowCut
from mmlm_efficient.pruning.flowcut_scores import query_scores, relay_weights
from tests import tiny


def test_scores_do_not_change_under_autocast() -> None:
    torch.manual_seed(0)
    relay, tokens = torch.randn(2, 4, 8), torch.randn(2, 9, 4, 8)
    query, keys, values = torch.randn(4, 8), torch.randn(4, 9, 8), torch.randn(4, 9, 8)
    want = relay_weights(relay, tokens, 0.3, None)
    want_query = query_scores(query, query, keys, values, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        got = relay_weights(relay, tokens, 0.3, None)
        got_query = query_scores(query, query, keys, values, 0.3)
    assert torch.equal(got, want)
    assert torch.equal(got_query.relation, want_query.relation)
    assert torch.equal(got_query.score, want_query.score)


def test_a_request_under_autocast() -> None:
    model = tiny.tiny_llava()
    inputs = tiny.batch([tiny.prompt(1, tiny.IMAGE_TOKEN, 5)], tiny.images(1))
    method = FlowCut(keep_tokens=9, llm_prune_layer=1, llm_keep_tokens=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), LMMParts(model) as parts:
        prepared = prepare(parts, inputs, [method])
        with prepared.active():
            model(**prepared.model_inputs)
    report = prepared.report().images[0]
    assert report.scores is not None
    assert report.scores.dtype == torch.float32
    assert len(report.kept) == 4
