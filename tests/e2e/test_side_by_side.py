"""Two nodes with a U-Net and a ControlNet each: residuals stay on the node they are computed on."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster as RayCluster

from sdxs.client import Client
from sdxs.control import Control
from sdxs.embedded import free_port
from sdxs.pipeline import OneStepPipeline
from services.app import APP_NAME, AppArgs, Placement, build
from services.fabric.environment import REPLICA_ENVIRONMENT
from services.fabric.peers import Address
from tests.controlnets import drawing
from tests.e2e.conftest import mapped
from trainer.session import LOCAL_RAY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EDGE = Control(drawing(), "edge")


@pytest.fixture
def gateway(control_bundle: Path, tmp_path: Path) -> Iterator[str]:
    """An application on two nodes, its gateway SERVING."""
    address = f"127.0.0.1:{free_port()}"
    one, beside = Placement(), Placement(replicas=2, max_replicas_per_node=1)
    variables = {**LOCAL_RAY, **REPLICA_ENVIRONMENT, "SDXS_GATEWAY_ADDRESS": address, "SDXS_REDIS_URL": ""}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        nodes = RayCluster()
        try:
            add_node(nodes, include_dashboard=False)
            add_node(nodes)
            ray.init(address=nodes.address, log_to_driver=False)
            serve.start(proxy_location="Disabled")
            args = AppArgs(
                model=str(control_bundle), text_encoder=one, unet=beside, controlnet=beside, worker=Placement(replicas=0)
            )
            serve.run_many(
                [serve.RunTarget(build(args), name=APP_NAME, route_prefix=None)], wait_for_applications_running=False
            )
            with Client(address) as client:
                client.wait_ready(480)
            yield address
            serve.shutdown()
        finally:
            ray.shutdown()
            nodes.shutdown()


def add_node(nodes: RayCluster, **options: bool) -> None:
    """Ray gives a node 30 seconds to start, whatever the machine is doing."""
    for left in reversed(range(3)):
        try:
            nodes.add_node(num_cpus=2, **options)
            return
        except Exception as error:
            if not left or "timed out during startup" not in str(error):
                raise


def replicas(deployment: str) -> list[Address]:
    """Where a deployment's replicas are."""
    handle: Any = serve.get_deployment_handle(deployment, APP_NAME)
    return list(handle.broadcast("addr").results(timeout_s=10))


def test_each_unet_reads_the_memory_of_the_controlnet_on_its_node(gateway: str, control_bundle: Path) -> None:
    with Client(gateway) as client, ThreadPoolExecutor(6) as threads:

        def ask(seed: int) -> bytes:
            return client.generate("red apple", seed=seed, format="raw", controls=[EDGE]).images[0].data

        end = time.monotonic() + 120  # the second node's replicas come later, and their callers learn of them every few seconds
        while True:
            list(threads.map(ask, range(20)))
            unets, controlnets = ({one.node: one.pid for one in replicas(name)} for name in ("unet", "controlnet"))
            if len(unets) == 2 and all(mapped(unet) for unet in unets.values()):
                break
            assert time.monotonic() < end, f"{unets} and {controlnets}: no memory is shared on one of the nodes"
            time.sleep(0.5)
        list(threads.map(ask, range(60)))
        assert ask(7) == OneStepPipeline.from_bundle(control_bundle)("red apple", 7, controls=[EDGE])[0].tobytes()
    assert unets.keys() == controlnets.keys(), "not one of each on each node"
    for node, unet in unets.items():
        assert mapped(unet) == mapped(controlnets[node]), "it has read the other node's too"
    assert len(set.union(*(mapped(unet) for unet in unets.values()))) == 2
