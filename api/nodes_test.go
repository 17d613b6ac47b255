package api_test

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

func TestNodeShapes(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.node(cpuNode)
	list, _, err := w.client().Nodes().List(nil)
	if err != nil || len(list) != 2 || list[0].NodeResources != nil || list[0].Attributes != nil {
		t.Errorf("%s, %v", pretty(t, list), err)
	}
	list, _, err = w.client().Nodes().List(&nomad.QueryOptions{Params: map[string]string{"resources": "true", "os": "true"}, Prefix: "0a"})
	if err != nil || len(list) != 1 || list[0].NodeResources.Cpu.CpuShares != 4000 || list[0].Attributes["os.name"] != "debian" {
		t.Errorf("%s, %v", pretty(t, list), err)
	}
	r := w.get("/v1/node/" + gpuNode)
	for _, want := range []string{`"SecretID":""`, `"HTTPAddr":""`, `"ReservedResources":{`, `"HostVolumes":{}`, `"Drain":false`} {
		if !strings.Contains(r.body, want) {
			t.Errorf("no %s in %s", want, r.body)
		}
	}
	if got := w.ids(w.get("/v1/node/pools"), "Name"); got != "all default" {
		t.Errorf("pools %s", got)
	}
	if got := w.ids(w.get("/v1/node/pool/all/nodes"), "ID"); got != gpuNode+" "+cpuNode {
		t.Errorf("nodes of all: %s", got)
	}
	w.wants("no such pool", w.get("/v1/node/pool/x/jobs"), 404, "node pool not found")
}

func TestDrainAndEligibility(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	nodes := w.client().Nodes()
	node := func() *cluster.Node { return w.store.State().Snapshot().Node(nil, gpuNode) }
	res, err := nodes.UpdateDrainOpts(gpuNode, &nomad.DrainOptions{DrainSpec: &nomad.DrainSpec{Deadline: -1}, Meta: map[string]string{"why": "test"}}, nil)
	if err != nil || res.NodeModifyIndex != node().ModifyIndex {
		t.Fatalf("%+v, %v", res, err)
	}
	if n := node(); !n.Drain || n.DrainStrategy.Deadline != -1 || n.LastDrain.Meta["why"] != "test" || n.SchedulingEligibility != "ineligible" {
		t.Errorf("%s", pretty(t, n))
	}
	w.wants("eligible while draining", w.do("PUT", "/v1/node/"+gpuNode+"/eligibility", `{"Eligibility":"eligible"}`), 500,
		"can not set node's scheduling eligibility to eligible while it is draining")
	if _, err := nodes.UpdateDrain(gpuNode, nil, true, nil); err != nil || node().Drain || node().SchedulingEligibility != "eligible" {
		t.Errorf("%v, %s", err, pretty(t, node()))
	}
	if _, err := nodes.ToggleEligibility(gpuNode, false, nil); err != nil || node().SchedulingEligibility != "ineligible" {
		t.Errorf("%v, %s", err, pretty(t, node()))
	}
	if r := w.do("PUT", "/v1/node/"+gpuNode+"/eligibility", `{"Eligibility":"maybe"}`); r.status != 500 {
		t.Errorf("bad eligibility: %d %s", r.status, r.body)
	}
	w.wants("other node", w.do("PUT", "/v1/node/"+gpuNode+"/eligibility", `{"NodeID":"x","Eligibility":"eligible"}`), 400, "node ID of the body does not match the path")
	if _, _, err := nodes.ForceEvaluate(gpuNode, nil); err != nil {
		t.Errorf("evaluate: %v", err)
	}
	if _, _, err := nodes.Purge(gpuNode, nil); err != nil || node() != nil {
		t.Errorf("purge: %v", err)
	}
}

// task is a wire with one running allocation and its log.
func withAlloc(t *testing.T) *wire {
	w := newWire(t)
	w.node(gpuNode)
	w.job("web")
	w.alloc(allocID(1), "web", gpuNode, "")
	w.nodes.write(t, "alloc/logs/t.stdout.0", "one\ntwo\n")
	return w
}

func TestLogs(t *testing.T) {
	w := withAlloc(t)
	path := "/v1/client/fs/logs/" + allocID(1) + "?task=t&type=stdout"
	r := w.get(path)
	w.wants("frames", r, 200, `{"Offset":8,"Data":"b25lCnR3bwo=","File":"alloc/logs/t.stdout.0"}`)
	if r.header.Get("Content-Type") != "application/json" {
		t.Errorf("headers %v", r.header)
	}
	r = w.get(path + "&plain=true&origin=end&offset=4")
	w.wants("plain", r, 200, "two\n")
	if r.header.Get("Content-Type") != "text/plain; charset=utf-8" || r.header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("headers %v", r.header)
	}
	for query, want := range map[string]string{
		"task=t&type=x":                       "must provide log type stdout/stderr",
		"task=t&type=stdout&origin=middle":    `invalid origin "middle": use start or end`,
		"task=t&type=stdout&offset=-1":        "offset must not be negative",
		"task=t&type=stdout&offset=x":         "Expect a number for `offset` query string parameter",
		"task=t&type=stdout&follow=perhaps":   "Expect `true` or `false` for `follow` query string parameter",
		"task=t&type=stdout&plain=everything": "Expect `true` or `false` for `plain` query string parameter",
	} {
		w.wants(query, w.get("/v1/client/fs/logs/"+allocID(1)+"?"+query), 400, want)
	}
	w.wants("unknown task", w.get("/v1/client/fs/logs/"+allocID(1)+"?task=x&type=stdout"), 404, `task "x" is not part of the allocation`)
}

// A followed log shows that it is alive, and ends when its reader goes.
func TestFollowedLogBeats(t *testing.T) {
	w := withAlloc(t)
	res, err := http.Get(w.url + "/v1/client/fs/logs/" + allocID(1) + "?task=t&type=stdout&follow=true")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	dec := json.NewDecoder(res.Body)
	var f nomad.StreamFrame
	if err := dec.Decode(&f); err != nil || string(f.Data) != "one\ntwo\n" {
		t.Fatalf("%+v, %v", f, err)
	}
	f = nomad.StreamFrame{}
	if err := dec.Decode(&f); err != nil || !f.IsHeartbeat() {
		t.Errorf("%+v, %v", f, err)
	}
}

func TestLargeFramesAreSplit(t *testing.T) {
	w := withAlloc(t)
	text := strings.Repeat("0123456789abcdef", 10_000) // 160,000 bytes
	w.nodes.write(t, "alloc/logs/t.stdout.0", text)
	dec := json.NewDecoder(strings.NewReader(w.get("/v1/client/fs/logs/" + allocID(1) + "?task=t&type=stdout").body))
	var got strings.Builder
	for {
		var f nomad.StreamFrame
		if err := dec.Decode(&f); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		got.Write(f.Data)
		if len(f.Data) > 64<<10 || f.Offset != int64(got.Len()) {
			t.Errorf("frame of %d bytes at %d, %d read so far", len(f.Data), f.Offset, got.Len())
		}
	}
	if got.String() != text {
		t.Errorf("%d bytes of %d", got.Len(), len(text))
	}
}

func TestFiles(t *testing.T) {
	w := withAlloc(t)
	at := func(op, query string) reply { return w.get("/v1/client/fs/" + op + "/" + allocID(1) + "?" + query) }
	var info nomad.AllocFileInfo
	w.decoded(at("stat", "path=alloc/logs/t.stdout.0"), &info)
	if info.Name != "t.stdout.0" || info.Size != 8 || info.IsDir {
		t.Errorf("%+v", info)
	}
	if got := w.ids(at("ls", "path=/alloc"), "Name"); got != "logs" {
		t.Errorf("ls: %s", got)
	}
	r := at("cat", "path=alloc/logs/t.stdout.0")
	w.wants("cat", r, 200, "one\ntwo\n")
	if r.header.Get("Content-Security-Policy") == "" || r.header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("headers %v", r.header)
	}
	w.wants("readat", at("readat", "path=alloc/logs/t.stdout.0&offset=1&limit=3"), 200, "ne\n")
	w.wants("readat without an offset", at("readat", "path=alloc/logs/t.stdout.0"), 400, "must provide an offset")
	w.wants("cat without a path", at("cat", ""), 400, "must provide a file name")
	if r := at("stat", "path=nosuch"); r.status != 404 {
		t.Errorf("missing file: %d %s", r.status, r.body)
	}
	w.nodes.write(t, "page.html", "<script>alert(1)</script>")
	if r := at("cat", "path=page.html"); r.header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("a task's page would run in the browser: %v", r.header)
	}
	w.nodes.write(t, "data", "\xff\xfe\x00")
	if r := at("cat", "path=data"); r.header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("headers %v", r.header)
	}
	w.wants("stream", at("stream", "path=alloc/logs/t.stdout.0&offset=4&follow=false"), 200, `{"Offset":8,"Data":"dHdvCg==","File":"alloc/logs/t.stdout.0"}`)
}

func TestCallsToNodes(t *testing.T) {
	w := withAlloc(t)
	alloc := &nomad.Allocation{ID: allocID(1), NodeID: gpuNode}
	if err := w.client().Allocations().Restart(alloc, "t", nil); err != nil {
		t.Error(err)
	}
	if err := w.client().Allocations().Signal(alloc, nil, "t", "SIGHUP"); err != nil {
		t.Error(err)
	}
	if got := w.nodes.asked(); got != "restart t, signal t SIGHUP" {
		t.Errorf("the node was asked to %s", got)
	}
	w.nodes.err = cluster.Errorf(cluster.CodeInvalid, "Task not running")
	w.wants("not running", w.do("PUT", "/v1/client/allocation/"+allocID(1)+"/restart", `{"TaskName":"t"}`), 500, "Task not running")
	w.nodes.err = cluster.Errorf(cluster.CodeUnavailable, "node is not connected")
	w.wants("not connected", w.do("PUT", "/v1/client/allocation/"+allocID(1)+"/restart", ""), 503, "node is not connected")
	stats, err := w.client().Nodes().Stats(gpuNode, nil)
	if err != nil || stats.Memory == nil || len(stats.DeviceStats) != 1 {
		t.Errorf("%s, %v", pretty(t, stats), err)
	}
	usage, err := w.client().Allocations().Stats(alloc, nil)
	if err != nil || usage.ResourceUsage.MemoryStats.RSS == 0 {
		t.Errorf("%s, %v", pretty(t, usage), err)
	}
	w.wants("checks", w.get("/v1/client/allocation/"+allocID(1)+"/checks"), 200, "{}")
	w.wants("whose stats", w.get("/v1/client/stats"), 400, "must provide node_id: servers run no allocations themselves")
}

func TestWithoutNodes(t *testing.T) {
	w := newWire(t, func(c *api.Config) { c.Nodes, c.Planner, c.Models, c.Servers = nil, nil, nil, nil })
	for _, path := range []string{
		"/v1/client/fs/logs/x?task=t&type=stdout", "/v1/client/stats?node_id=x", "/v1/agent/members", "/v1/status/peers",
		"/v1/operator/raft/configuration", "/v1/artifacts/sha256:00",
	} {
		if r := w.get(path); r.status != http.StatusNotImplemented {
			t.Errorf("%s: %d %s", path, r.status, r.body)
		}
	}
	if r := w.get("/v1/agent/self"); r.status != 200 {
		t.Errorf("self: %d %s", r.status, r.body)
	}
}

func TestSchedulerConfiguration(t *testing.T) {
	w := newWire(t)
	op := w.client().Operator()
	cfg, _, err := op.SchedulerGetConfiguration(nil)
	if err != nil || cfg.SchedulerConfig.SchedulerAlgorithm != "binpack" {
		t.Fatalf("%s, %v", pretty(t, cfg), err)
	}
	cfg.SchedulerConfig.SchedulerAlgorithm = "spread"
	res, _, err := op.SchedulerSetConfiguration(cfg.SchedulerConfig, nil)
	if err != nil || !res.Updated {
		t.Fatalf("%+v, %v", res, err)
	}
	res, _, err = op.SchedulerCASConfiguration(cfg.SchedulerConfig, nil) // with the index of before
	if err != nil || res.Updated {
		t.Errorf("%+v, %v", res, err)
	}
	for body, status := range map[string]int{
		`{"SchedulerAlgorithm":"random"}`:                         400,
		`{"PreemptionConfig":{"SystemSchedulerEnabled":true}}`:    501,
		`{"MemoryOversubscriptionEnabled":true}`:                  501,
		`{"SchedulerAlgorithm":"binpack","PauseEvalBroker":true}`: 200,
	} {
		if r := w.do("PUT", "/v1/operator/scheduler/configuration", body); r.status != status {
			t.Errorf("%s: %d %s", body, r.status, r.body)
		}
	}
	w.wants("bad cas", w.do("PUT", "/v1/operator/scheduler/configuration?cas=x", "{}"), 400, "Expect a number for `cas` query string parameter")
}
