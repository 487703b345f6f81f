"""The benchmarks run, compare results before they time them, and count FLOPs right. Nothing here looks at a time."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

# At the end: at the front, the source tree of jax_flash would hide the installed package with its extension.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import host, memory, peers, plot, run, workloads


@pytest.fixture
def on_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("float32 workloads are for the CPU")


def brute_force_pairs(workload: workloads.Workload) -> int:
    """Asks of every pair on its own whether it is visible, from the definition of the masks."""
    lengths = [(n, n) for n in workload.sequence_lengths]
    total = 0
    for seqlen_q, seqlen_kv in lengths or [(workload.seqlen_q, workload.seqlen_kv)] * workload.batch:
        for i in range(seqlen_q):
            for j in range(seqlen_kv):
                distance = i + seqlen_kv - seqlen_q - j
                visible = distance >= 0 or not workload.is_causal
                if workload.window:
                    left, right = workload.window
                    visible &= left == -1 or distance <= left
                    visible &= right == -1 or distance >= -right
                total += visible
    return total


def small(**options) -> workloads.Workload:
    base = workloads.Workload(
        name="small",
        batch=2,
        seqlen_q=7,
        seqlen_kv=7,
        num_heads=3,
        num_heads_kv=1,
        head_dim=4,
        head_dim_v=4,
        dtype="float32",
    )
    return dataclasses.replace(base, **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, (-1, -1), (2, 0), (2, -1), (-1, 3), (0, 0), (20, 20)])
@pytest.mark.parametrize("seqlen_q, seqlen_kv", [(7, 7), (5, 12), (12, 5), (1, 9)])
def test_visible_pairs_match_brute_force(is_causal, window, seqlen_q, seqlen_kv):
    workload = small(is_causal=is_causal, window=window, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
    assert workload.visible_pairs == brute_force_pairs(workload)


@pytest.mark.parametrize("workload", workloads.GROUPS["cpu_smoke"](), ids=lambda workload: workload.name)
def test_visible_pairs_of_the_smoke_group_match_brute_force(workload):
    assert workload.visible_pairs == brute_force_pairs(workload)


def test_flops_follow_the_convention():
    batch, seqlen_q, seqlen_kv, num_heads, head_dim = 2, 5, 7, 3, 4
    workload = small(batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, num_heads=num_heads, head_dim=head_dim)
    forward = 4 * batch * seqlen_q * seqlen_kv * num_heads * head_dim
    assert workload.flops("forward") == forward
    assert workload.flops("backward") == 2.5 * forward
    assert workload.flops("forward_backward") == 3.5 * forward
    assert small(head_dim=6, head_dim_v=4).flops("forward") == small(head_dim=5, head_dim_v=5).flops("forward")
    causal = small(is_causal=True, seqlen_q=512, seqlen_kv=512)
    assert causal.flops("forward") / small(seqlen_q=512, seqlen_kv=512).flops("forward") == 513 / 1024


@pytest.mark.parametrize("group", workloads.GROUPS)
def test_groups_are_well_formed(group):
    members = workloads.GROUPS[group]()
    assert len({workload.name for workload in members}) == len(members)
    for workload in members:
        assert workload.num_heads % workload.num_heads_kv == 0
        if workload.sequence_lengths:
            assert (workload.batch, workload.seqlen_q) == (1, sum(workload.sequence_lengths))
            assert workload.seqlen_kv == workload.seqlen_q
        if group in ("hopper", "hopper_between"):
            assert workload.batch * workload.seqlen_q == 16384
            assert workload.num_heads * workload.head_dim == 2048


def test_smoke_group_end_to_end(on_cpu, tmp_path, capsys):
    out = tmp_path / "new" / "smoke.json"
    arguments = ["--group", "cpu_smoke", "--rounds", "1", "--peers", "jax_flash", "xla", "--out", str(out)]
    arguments += ["--commit", "0123abc"]  # a copy, whatever git knows here
    assert run.main(arguments) == 0
    report = json.loads(out.read_text())
    assert (report["commit"], report["dirty"]) == ("0123abc", False)
    assert report["command"].startswith("python -m benchmarks.run --group cpu_smoke")
    assert {"date", "commit", "dirty", "cpu", "cores", "gpus_and_drivers", "versions"} <= report.keys()
    assert {"jax", "jaxlib"} <= report["versions"].keys()
    ours = [record for record in report["results"] if record["implementation"] == "jax_flash"]
    members = workloads.GROUPS["cpu_smoke"]()
    assert {record["workload"] for record in ours} == {workload.name for workload in members}
    for record in ours:
        assert "ms" in record and "tflops" in record and len(record["samples_ms"]) == 1
        assert ("difference" in record) != ("unchecked" in record)
    printed = capsys.readouterr().out
    assert "GFLOP/s" in printed
    assert "xla skipped" in printed
    summary = printed[printed.index("GFLOP/s, forward / forward_backward") :].splitlines()
    assert summary[1].split() == ["workload", "jax_flash", "xla", "jax_flash/torch"]
    assert [line.split()[0] for line in summary[2:]] == [workload.name for workload in members]


def test_every_pass_agrees_without_timing(on_cpu, tmp_path):
    out = tmp_path / "check.json"
    arguments = ["--group", "cpu_smoke", "--only", "tiny_full", "--peers", "jax_flash", "xla", "--check-only"]
    assert run.main([*arguments, "--passes", *workloads.PASSES, "--out", str(out)]) == 0
    records = json.loads(out.read_text())["results"]
    assert [r["pass"] for r in records if "difference" in r] == list(workloads.PASSES)
    assert not any("ms" in record for record in records)


def test_a_wrong_result_is_reported_and_not_timed(on_cpu, monkeypatch, tmp_path):
    xla = next(peer for peer in peers.PEERS if peer.name == "xla")

    def wrong(workload, inputs, pass_):
        return xla.build(workload, inputs | {"value": inputs["value"] * 1.01}, pass_)

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("jax_flash", xla.unavailable, wrong), xla))
    out = tmp_path / "wrong.json"
    assert run.main(["--group", "cpu_smoke", "--only", "tiny_full", "--rounds", "1", "--out", str(out)]) == 1
    for record in json.loads(out.read_text())["results"]:
        assert ("failed" in record) == (record["implementation"] == "jax_flash")
        assert ("ms" in record) == (record["implementation"] == "xla")


@pytest.mark.parametrize("damage", [0.0, np.nan])
def test_comparison_sees_one_damaged_head(damage):
    reference = np.random.default_rng(0).standard_normal((4, 32, 16, 8), dtype=np.float32)
    damaged = reference.copy()
    assert run.difference(damaged, reference) == 0
    damaged[2, 16:, 5] *= damage
    assert not run.difference(damaged, reference) <= max(run.TOLERANCE.values())


def test_no_workload_matches(capsys):
    assert run.main(["--group", "cpu_smoke", "--only", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    record = {"workload": "w", "pass": "forward", "implementation": "xla", "ms": 1.0, "tflops": 0.1}
    report = {
        "backend": "cpu",
        "device": "a processor",
        "cores": 2,
        "versions": {"jax": "1"},
        "commit": None,
        "dirty": None,
    }
    path = tmp_path / "plots" / "report.png"
    plot.draw(report | {"results": [record, record | {"implementation": "cudnn", "skipped": "needs a GPU"}]}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_host_cost(tmp_path, capsys):
    out = tmp_path / "host.json"
    assert host.main(["--repeats", "2", "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    assert {(r["function"], r["calls"]) for r in results} >= {("elementwise", 1), ("attention", 1), ("attention", 32)}
    assert "in a chain" in capsys.readouterr().out


def test_planned_memory_is_linear_in_the_sequence_length(on_cpu, capsys):
    temporary = []
    for seqlen in (1024, 2048):
        assert memory.main(["--one", "forward_backward", str(seqlen)]) == 0
        temporary.append(json.loads(capsys.readouterr().out)["temporary_bytes"])
    assert temporary[1] <= 2.5 * temporary[0]
