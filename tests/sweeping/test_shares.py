"""The jobs of a sweep share out the machine, and more than it holds is refused."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import jax
import pytest

from dimat_jax._sweeping import _shares
from dimat_jax._sweeping._shares import Devices, Share, applied, make_shares, share_out
from dimat_jax.errors import UserError

CPU = Devices("cpu", 1)


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(_shares, "_cores", lambda: list(range(10, 18)))


def visible(share: Share) -> str:
    options = share.jax_options
    assert options["jax_cuda_visible_devices"] == options["jax_rocm_visible_devices"]
    return options["jax_cuda_visible_devices"]


def test_a_single_job_has_the_whole_machine():
    assert share_out(1) == [Share(None, {}, {})]


@pytest.mark.parametrize(("n_jobs", "sizes"), [(2, [4, 4]), (3, [2, 3, 3])])
def test_every_core_belongs_to_one_job(eight_cores, n_jobs, sizes):
    shares = make_shares(n_jobs, CPU)
    cores = [share.cores or frozenset() for share in shares]
    assert [len(part) for part in cores] == sizes
    assert frozenset().union(*cores) == frozenset(range(10, 18))
    assert all(not share.jax_options and not share.environment for share in shares)


def test_where_cores_cannot_be_bound_xla_gets_a_number_of_threads(monkeypatch):
    monkeypatch.setattr(_shares, "_cores", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    threads = [share.environment["PJRT_NPROC"] for share in make_shares(2, CPU)]
    assert threads == ["2", "3"]


def test_every_gpu_belongs_to_one_job(eight_cores):
    assert [visible(s) for s in make_shares(2, Devices("gpu", 4))] == ["0,1", "2,3"]
    shares = make_shares(3, Devices("gpu", 4))
    assert [visible(share) for share in shares] == ["0", "1", "2,3"]
    assert all(not share.environment for share in shares)


def test_jobs_that_share_a_gpu_share_its_memory(eight_cores, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    shares = make_shares(4, Devices("gpu", 2), 2)
    assert [visible(share) for share in shares] == ["0", "1", "0", "1"]
    for share in shares:
        assert share.environment == {"XLA_CLIENT_MEM_FRACTION": "0.450"}


def test_the_old_name_of_the_memory_limit_is_kept_since_xla_refuses_both(
    eight_cores, monkeypatch
):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    share = make_shares(2, Devices("gpu", 1), 2)[0]
    assert share.environment == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.450"}


@pytest.mark.parametrize(
    ("n_jobs", "devices", "message"),
    [
        (9, CPU, "--jobs=9 needs as many CPU cores, .* may use 8; --jobs is at most 8"),
        (3, Devices("gpu", 2), "there are 2 GPUs, .*per_device=1; .* at most 2 here"),
        (2, Devices("tpu", 4), "cannot share the tpu devices .* use --jobs=1"),
    ],
)
def test_more_jobs_than_the_machine_holds_are_refused(
    eight_cores, n_jobs, devices, message
):
    with pytest.raises(UserError, match=message):
        make_shares(n_jobs, devices)


def test_a_number_of_jobs_per_device_is_refused_where_it_has_no_effect(eight_cores):
    with pytest.raises(UserError, match="per_device=2 has no effect with one job"):
        share_out(1, 2)
    with pytest.raises(UserError, match="per_device=2 has no effect here: .* no GPU"):
        make_shares(2, CPU, 2)


def has_share() -> tuple[frozenset[int], str | None]:
    return frozenset(os.sched_getaffinity(0)), os.environ.get("PJRT_NPROC")


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="the system binds no cores"
)
def test_a_new_process_has_its_share_and_this_one_keeps_all():
    before = has_share()
    share = Share(frozenset([min(before[0])]), {"PJRT_NPROC": "7"}, {})
    context = multiprocessing.get_context("spawn")
    with applied(share), ProcessPoolExecutor(1, mp_context=context) as executor:
        assert executor.submit(has_share).result() == (share.cores, "7")
    assert has_share() == before


def test_the_devices_of_this_machine_are_found_in_another_process(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # This process has split its CPU into five devices (see conftest.py).
    assert jax.device_count() == 5
    assert _shares._available_devices() == CPU
