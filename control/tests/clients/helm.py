"""A release through its life with Helm: installed with definitions and hooks, changed, removed."""

import asyncio
import os
import sys

import helm_sdkpy as helm

CHART = sys.argv[1]


async def main():
    config = helm.Configuration(namespace="default", kubeconfig=os.environ["KUBECONFIG"])
    installed = await helm.Install(config).run("quay", CHART, wait=True, timeout=60)
    assert installed["info"]["status"] == "deployed", installed
    await helm.Upgrade(config).run("quay", CHART, values={"greeting": "ahoy"}, wait=True, timeout=60)
    assert (await helm.GetValues(config).run("quay"))["greeting"] == "ahoy"
    print("upgraded", flush=True)
    sys.stdin.readline()
    history = await helm.History(config).run("quay")
    assert [entry["version"] for entry in history] == [1, 2], history
    assert [release["name"] for release in await helm.List(config).run()] == ["quay"]
    await helm.Uninstall(config).run("quay", wait=True, timeout=60)
    assert not await helm.List(config).run(all=True)
    print("removed", flush=True)


asyncio.run(main())
