package api_test

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

func TestIndexHeaders(t *testing.T) {
	w := newWire(t)
	r := w.get("/v1/allocations")
	w.wants("no allocations", r, 200, "[]")
	for name, want := range map[string]string{
		"X-Nomad-Index": "0", "X-Nomad-KnownLeader": "true", "X-Nomad-LastContact": "0", "Content-Type": "application/json",
	} {
		if got := r.header.Get(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	node := w.node(gpuNode)
	w.job("web")
	// The index is that of the table or object, not of the log.
	for path, want := range map[string]uint64{
		"/v1/nodes": node.Index, "/v1/node/" + gpuNode: node.Index, "/v1/jobs": 2, "/v1/job/web": 2, "/v1/allocations": 0,
		"/v1/deployments": 0, "/v1/job/web/summary": 2, "/v1/job/web/deployment": 0, "/v1/job/nosuch": 2,
		"/v1/allocation/" + allocID(1): 0, "/v1/namespaces": 1, "/v1/services": 2, "/v1/job/web/submission?version=0": 0,
	} {
		if got := w.get(path).header.Get("X-Nomad-Index"); got != strconv.FormatUint(want, 10) {
			t.Errorf("index of %s is %s, want %d", path, got, want)
		}
	}
	missing := w.get("/v1/job/nosuch")
	w.wants("missing job", missing, 404, "job not found")
	if missing.header.Get("X-Nomad-KnownLeader") != "true" || missing.header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("headers of a missing job: %v", missing.header)
	}
	if r := w.get("/v1/agent/members"); r.header.Get("X-Nomad-Index") != "" {
		t.Error("an answer of the agent itself has an index")
	}
}

func TestErrorTexts(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.job("web")
	no := "ffffffff-ffff-ffff-ffff-ffffffffffff"
	for _, c := range []struct {
		method, path, body string
		status             int
		text               string
	}{
		{"GET", "/v1/nosuchpath", "", 404, "no such call: GET /v1/nosuchpath"},
		{"GET", "/v1", "", 404, "no such call: GET /v1"},
		{"GET", "/v1/job/", "", 404, "no such call: GET /v1/job/"},
		{"PUT", "/v1/job//scale", "{}", 404, "no such call: PUT /v1/job//scale"},
		{"PATCH", "/v1/jobs", "{}", 405, "Invalid method"},
		{"GET", "/v1/job/web/plan", "", 405, "Invalid method"},
		{"GET", "/v1/jobs?region=nosuch", "", 500, "No path to region"},
		{"GET", "/v1/jobs?per_page=x", "", 400, "Expect a number for `per_page` query string parameter"},
		{"GET", "/v1/jobs?index=x", "", 400, "Invalid index"},
		{"GET", "/v1/jobs?wait=x", "", 400, "Invalid wait time"},
		{"GET", "/v1/jobs?stale=maybe", "", 400, "Expect `true` or `false` for `stale` query string parameter"},
		{"GET", "/v1/job/nosuch", "", 404, "job not found"},
		{"GET", "/v1/job/nosuch/summary", "", 404, "job not found"},
		{"GET", "/v1/job/nosuch/versions", "", 404, "job versions not found"},
		{"GET", "/v1/job/nosuch/scale", "", 404, "job not found"},
		{"GET", "/v1/job/nosuch/submission?version=0", "", 404, "job source not found"},
		{"GET", "/v1/job/nosuch/allocations", "", 200, "[]"},
		{"GET", "/v1/job/nosuch/evaluations", "", 200, "[]"},
		{"GET", "/v1/job/nosuch/deployments", "", 200, "[]"},
		{"GET", "/v1/job/nosuch/deployment", "", 200, "null"},
		{"GET", "/v1/jobs?namespace=nosuch", "", 200, "[]"},
		{"PUT", "/v1/job/nosuch/evaluate", "{}", 400, "Job ID must be specified"},
		{"PUT", "/v1/job/nosuch/evaluate", `{"JobID":"nosuch"}`, 500, "job not found"},
		{"PUT", "/v1/job/nosuch/evaluate", `{"JobID":"web"}`, 400, "JobID not same as job name"},
		{"PUT", "/v1/job/nosuch/scale", `{"Count":1,"Target":{"Group":"g"}}`, 404, `job "nosuch" not found`},
		{"PUT", "/v1/job/web/scale", `{"Count":1,"Target":{"Group":"x"}}`, 400, `task group "x" specified for scaling does not exist in job`},
		{"PUT", "/v1/job/web/revert", `{"JobID":"web","JobVersion":99}`, 500, `job "web" in namespace "default" at version 99 not found`},
		{"PUT", "/v1/job/web/revert", `{"JobID":"web","JobVersion":0}`, 500, "can't revert to current version"},
		{"PUT", "/v1/job/web/revert", `{"JobID":"web","JobVersion":1,"EnforcePriorVersion":7}`, 500, "Current job has version 0; enforcing version 7"},
		{"PUT", "/v1/job/web/plan", `{"Job":{"ID":"other"}}`, 400, "Job ID does not match"},
		{"GET", "/v1/evaluation/xx", "", 500, "failed to lookup eval: eval lookup failed: index error: UUID must be 36 characters"},
		{"GET", "/v1/evaluation/" + no, "", 404, "eval not found"},
		{"GET", "/v1/evaluations?prefix=zz", "", 500, "eval lookup failed: index error: Invalid UUID: encoding/hex: invalid byte: U+007A 'z'"},
		{"GET", "/v1/evaluations?filter=JobID%3D%3D1&job=x", "", 400, "Filter expression cannot be used with other filter parameters"},
		{"GET", "/v1/allocation/" + no, "", 404, "alloc not found"},
		{"GET", "/v1/allocation/abc", "", 500, "alloc lookup failed: index error: UUID must be 36 characters"},
		{"GET", "/v1/node/" + no, "", 404, "node not found"},
		{"GET", "/v1/node/nope/allocations", "", 200, "[]"},
		{"GET", "/v1/nodes?prefix=2a3", "", 500, "node lookup failed: index error: Input (without hyphens) must be even length"},
		{"GET", "/v1/nodes?filter=Nope==1", "", 400, `failed to read result page: error finding value in datum: /Nope at part 0: couldn't find key: struct field with name "Nope"`},
		{"GET", "/v1/deployment/" + no, "", 404, "deployment not found"},
		{"PUT", "/v1/node/" + no + "/eligibility", `{"Eligibility":"eligible"}`, 404, "node not found"},
		{"PUT", "/v1/jobs", "{}", 400, "Job must be specified"},
		{"PUT", "/v1/jobs", `{"Job":{"ID":5}}`, 400, "the request body does not fit this call: Job.ID is a JSON number; expected a string"},
		{"PUT", "/v1/jobs", `[]`, 400, "the request body does not fit this call: it is a JSON array; expected an object"},
		{"PUT", "/v1/jobs", `{"Job":{"ID":"x"}} more`, 400, "the request body is not the JSON that this call takes: invalid character 'm' after top-level value"},
		{"PUT", "/v1/jobs", "xx", 400, "the request body is not the JSON that this call takes: invalid character 'x' looking for beginning of value"},
		{"PUT", "/v1/jobs", "", 400, "Request body is empty"},
		{"DELETE", "/v1/namespace/default", "", 500, "can not delete default namespace"},
		{"GET", "/v1/namespace/dev", "", 404, "Namespace not found"},
		{"GET", "/v1/acl/policies", "", 400, "ACL support disabled"},
		{"POST", "/v1/acl/bootstrap", "", 400, "ACL support disabled"},
		{"GET", "/v1/var/some/path", "", 404, "variable not found"},
		{"GET", "/v1/operator/license", "", 204, ""},
		{"GET", "/v1/sentinel/policies", "", 501, "Nomad Enterprise only endpoint"},
		{"DELETE", "/v1/operator/raft/peer?id=nope", "", 500, `id "nope" was not found in the Raft configuration`},
		{"PUT", "/v1/operator/raft/transfer-leadership?address=127.0.0.1:9999", "", 400, `address "127.0.0.1:9999" was not found in the Raft configuration`},
		{"GET", "/v1/client/fs/logs/" + no + "?type=stdout", "", 400, "must provide task name"},
		{"GET", "/v1/client/fs/logs/" + no + "?task=t&type=stdout", "", 404, `Unknown allocation "` + no + `"`},
		{"GET", "/v1/client/stats?node_id=" + no, "", 404, "Unknown node " + no},
		{"GET", "/v1/volumes?type=csi", "", 200, "[]"},
		{"GET", "/v1/regions", "", 200, `["global"]`},
		{"GET", "/v1/status/leader", "", 200, `"127.0.0.1:7648"`},
		{"GET", "/v1/status/peers", "", 200, `["127.0.0.1:7648"]`},
	} {
		w.wants(c.method+" "+c.path, w.do(c.method, c.path, c.body), c.status, c.text)
	}
	if r := w.get("/v1/jobs?filter=bogus"); r.status != 400 || !strings.HasPrefix(r.body, "failed to create result paginator: failed to read filter expression: ") {
		t.Errorf("bad filter: %d %s", r.status, r.body)
	}
	if r := w.do("PUT", "/v1/search", `{"Prefix":"a","Context":"bogus"}`); r.status != 500 || !strings.HasPrefix(r.body, "context must be one of [allocs jobs ") {
		t.Errorf("bad context: %d %s", r.status, r.body)
	}
}

// What Nomad has and this version has not is refused by a sentence.
func TestNotSupported(t *testing.T) {
	w := newWire(t)
	for _, c := range [][2]string{
		{"GET", "/.well-known/jwks.json"},
		{"GET", "/v1/event/stream"},
		{"PUT", "/v1/var/a/b"},
		{"GET", "/v1/operator/keyring/keys"},
		{"PUT", "/v1/system/gc"},
		{"GET", "/v1/agent/monitor"},
		{"PUT", "/v1/node/pools"},
		{"GET", "/v1/client/allocation/x/exec"},
		{"PUT", "/v1/client/metadata"},
		{"PUT", "/v1/search/fuzzy"},
		{"DELETE", "/v1/evaluations"},
		{"PUT", "/v1/agent/join"},
		{"GET", "/v1/jobs/statuses"},
		{"GET", "/v1/operator/snapshot"},
	} {
		r := w.do(c[0], c[1], "")
		if r.status != http.StatusNotImplemented || !strings.Contains(r.body, " ") {
			t.Errorf("%s %s: %d %q", c[0], c[1], r.status, r.body)
		}
	}
}

// A job's ID may hold anything, slashes and line ends too.
func TestOddJobIDs(t *testing.T) {
	w := newWire(t)
	jobs := w.client().Jobs()
	for _, id := range []string{"job-id/with\\troublesome:characters\n?&字", "a/allocations/b", "plan", "par/dispatch-1-12345678", "a//b", "%2F"} {
		if strings.ContainsAny(id, "\n\x00 ") {
			w.job("x", func(j *cluster.Job) { j.ID = id }) // the job spec's rules refuse it, the routes must not
		} else if _, _, err := jobs.Register(sleeper(id), nil); err != nil {
			t.Errorf("register %q: %v", id, err)
			continue
		}
		j, _, err := jobs.Info(id, nil)
		if err != nil || *j.ID != id {
			t.Errorf("info of %q: %v", id, err)
		}
		if _, _, err := jobs.Summary(id, nil); err != nil {
			t.Errorf("summary of %q: %v", id, err)
		}
		if _, _, _, err := jobs.Versions(id, true, nil); err != nil {
			t.Errorf("versions of %q: %v", id, err)
		}
		if !strings.ContainsAny(id, "\n") {
			if _, _, err := jobs.Plan(sleeper(id), true, nil); err != nil {
				t.Errorf("plan of %q: %v", id, err)
			}
		}
		if _, _, err := jobs.Scale(id, "g", ptr(2), "", false, nil, nil); err != nil {
			t.Errorf("scale of %q: %v", id, err)
		}
		if _, _, err := jobs.Deregister(id, false, nil); err != nil {
			t.Errorf("deregister %q: %v", id, err)
		}
	}
}

func TestNoLeader(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.store.lead("")
	for _, path := range []string{"/v1/nodes", "/v1/node/" + gpuNode, "/v1/status/leader", "/v1/services"} {
		w.wants(path, w.get(path), 500, "No cluster leader")
	}
	body, err := json.Marshal(map[string]any{"Job": sleeper("web")})
	if err != nil {
		t.Fatal(err)
	}
	w.wants("write", w.do("PUT", "/v1/jobs", string(body)), 500, "No cluster leader")
	r := w.get("/v1/nodes?stale=")
	if got := w.ids(r, "ID"); got != gpuNode || r.header.Get("X-Nomad-KnownLeader") != "false" || r.header.Get("X-Nomad-LastContact") != "1234" {
		t.Errorf("stale read: %s, %v", got, r.header)
	}
	if r := w.get("/v1/agent/health"); r.status != 500 || !strings.Contains(r.body, `"ok":false`) {
		t.Errorf("health: %d %s", r.status, r.body)
	}
	w.store.lead("somebody-else")
	if r := w.get("/v1/nodes"); r.status != 200 || r.header.Get("X-Nomad-KnownLeader") != "true" {
		t.Errorf("on a follower: %d %v", r.status, r.header)
	}
	w.store.lead("me")
	if r := w.get("/v1/agent/health?type=server"); r.status != 200 || !strings.Contains(r.body, `"ok":true`) {
		t.Errorf("health: %d %s", r.status, r.body)
	}
}

// later starts a request; its answer comes when it ends.
func (w *wire) later(path string) <-chan reply {
	ch := make(chan reply, 1)
	go func() { ch <- w.get(path) }()
	return ch
}

// blocked waits until that many queries wait for a change.
func (w *wire) blocked(n int) {
	w.Helper()
	for {
		r := w.get("/v1/metrics?format=prometheus")
		if strings.Contains(r.body, "\nrxvision_http_blocking_queries "+strconv.Itoa(n)+"\n") {
			return
		}
		if w.Context().Err() != nil {
			w.Fatal("no query waits")
		}
	}
}

func TestBlockingQueryReturnsWhenItsObjectChanges(t *testing.T) {
	w := newWire(t)
	at := w.node(gpuNode).Index
	w.node(cpuNode)
	one := w.later("/v1/node/" + gpuNode + "?index=" + strconv.FormatUint(at, 10))
	w.blocked(1)
	w.apply(&cluster.UpdateEligibility{NodeID: cpuNode, Eligibility: cluster.NodeIneligible}) // another node: no answer to this
	w.blocked(1)
	change := w.apply(&cluster.UpdateEligibility{NodeID: gpuNode, Eligibility: cluster.NodeIneligible})
	r := <-one
	var n nomad.Node
	w.decoded(r, &n)
	if n.SchedulingEligibility != "ineligible" || r.header.Get("X-Nomad-Index") != strconv.FormatUint(change.Index, 10) {
		t.Errorf("answer at index %s: %s", r.header.Get("X-Nomad-Index"), n.SchedulingEligibility)
	}
	// An index that is behind answers at once.
	if r := w.get("/v1/node/" + gpuNode + "?index=1&wait=1h"); r.status != 200 {
		t.Errorf("old index: %d", r.status)
	}
}

func TestBlockingQueryOfWhatIsNotThereYet(t *testing.T) {
	w := newWire(t)
	w.job("other")
	ch := w.later("/v1/job/web?index=" + strconv.FormatUint(w.store.index, 10))
	w.blocked(1)
	w.job("web")
	if r := <-ch; r.status != 200 || !strings.Contains(r.body, `"ID":"web"`) {
		t.Errorf("%d %s", r.status, r.body)
	}
}

func TestBlockingQueryEndsWithTheSameAnswerAtItsTimeout(t *testing.T) {
	w := newWire(t)
	at := strconv.FormatUint(w.node(gpuNode).Index, 10)
	r := w.get("/v1/nodes?index=" + at + "&wait=20ms")
	if r.header.Get("X-Nomad-Index") != at || w.ids(r, "ID") != gpuNode {
		t.Errorf("%v %s", r.header, r.body)
	}
	w.wants("missing", w.get("/v1/job/x?wait=20ms&index=5"), 404, "job not found")
}

func TestRestoreWakesBlockingQueries(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	ch := w.later("/v1/nodes?index=1000")
	w.blocked(1)
	w.store.mu.Lock()
	old := w.store.state
	w.store.state = cluster.NewState()
	w.store.mu.Unlock()
	old.Abandon()
	w.wants("after the restore", <-ch, 200, "[]")
}

func TestBlockingQueryEndsWithItsClient(t *testing.T) {
	w := newWire(t)
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.url+"/v1/nodes?index=1000", nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if res, err := http.DefaultClient.Do(req); err == nil {
			res.Body.Close()
		}
	}()
	w.blocked(1)
	cancel()
	<-ended
	w.blocked(0)
}

func TestServeEndsBlockingQueriesAndStreams(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	w.job("web")
	w.alloc(allocID(1), "web", gpuNode, "")
	w.nodes.write(t, "alloc/logs/t.stdout.0", "hello")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- api.Serve(ctx, l, w.server) }()
	var ended []chan struct{}
	for _, path := range []string{"/v1/nodes?index=1000", "/v1/client/fs/logs/" + allocID(1) + "?task=t&type=stdout&follow=true"} {
		ch := make(chan struct{})
		ended = append(ended, ch)
		go func() {
			defer close(ch)
			res, err := http.DefaultClient.Get("http://" + l.Addr().String() + path)
			if err != nil {
				return
			}
			defer res.Body.Close()
			_, _ = io.Copy(io.Discard, res.Body) // cut short
		}()
	}
	w.blocked(1)
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	for _, ch := range ended {
		<-ch
	}
}

func TestPages(t *testing.T) {
	w := newWire(t)
	for _, id := range []string{"bat", "par", "per", "web"} {
		w.job(id)
	}
	r := w.get("/v1/jobs?per_page=1")
	if got, next := w.ids(r, "ID"), r.header.Get("X-Nomad-NextToken"); got != "bat" || next != "default.par" {
		t.Errorf("first page: %s, next %s", got, next)
	}
	r = w.get("/v1/jobs?per_page=2&next_token=default.par")
	if got, next := w.ids(r, "ID"), r.header.Get("X-Nomad-NextToken"); got != "par per" || next != "default.web" {
		t.Errorf("second page: %s, next %s", got, next)
	}
	r = w.get("/v1/jobs?per_page=1&reverse=true")
	if got, next := w.ids(r, "ID"), r.header.Get("X-Nomad-NextToken"); got != "web" || next != "default.per" {
		t.Errorf("from the end: %s, next %s", got, next)
	}
	if got := w.ids(w.get("/v1/jobs?reverse=true&next_token=default.per"), "ID"); got != "per par bat" {
		t.Errorf("on from the end: %s", got)
	}
	if got := w.ids(w.get("/v1/jobs?next_token=zzz"), "ID"); got != "" {
		t.Errorf("token behind the end: %s", got)
	}
	if got := w.ids(w.get("/v1/jobs?prefix=pe"), "ID"); got != "per" {
		t.Errorf("prefix: %s", got)
	}
	if got := w.ids(w.get("/v1/jobs?prefix=p&per_page=1&filter="+url.QueryEscape(`ID matches "r$" and Type == "service"`)), "ID"); got != "par" {
		t.Errorf("filter and prefix: %s", got)
	}
	if got := w.ids(w.get("/v1/jobs?namespace=*&filter="+url.QueryEscape(`JobSummary.Namespace == "default" and ID != "web"`)), "ID"); got != "bat par per" {
		t.Errorf("filter: %s", got)
	}
	r = w.get("/v1/evaluations?per_page=3")
	if got, next := w.ids(r, "JobID"), r.header.Get("X-Nomad-NextToken"); got != "bat par per" || next != "4."+evalID(4) {
		t.Errorf("evaluations: %s, next %s", got, next)
	}
	if got := w.ids(w.get("/v1/evaluations?next_token=4."+evalID(4)), "JobID"); got != "web" {
		t.Errorf("evaluations on: %s", got)
	}
	if got := w.ids(w.get("/v1/evaluations?job=par&status=pending"), "JobID"); got != "par" {
		t.Errorf("evaluations of a job: %s", got)
	}
	if got := w.ids(w.get("/v1/evaluations?prefix=E0000000-0000"), "JobID"); got != "bat par per web" {
		t.Errorf("evaluations by prefix: %s", got)
	}
	if r := w.get("/v1/evaluations?next_token=x"); r.status != 400 {
		t.Errorf("bad token: %d %s", r.status, r.body)
	}
	w.wants("count", w.get(`/v1/evaluations/count?filter=JobID+%3D%3D+%22web%22`), 200, `{"Count":1}`)
}

func TestBodiesAreBounded(t *testing.T) {
	w := newWire(t)
	for what, c := range map[string]struct {
		body   string
		status int
	}{
		"too large":        {`{"Job":"` + strings.Repeat("x", api.MaxBody) + `"}`, http.StatusRequestEntityTooLarge},
		"too deep":         {strings.Repeat("[", 200), 400},
		"too many objects": {`{"Job":{"TaskGroups":[` + strings.Repeat("{},", 30_000) + `{}]}}`, 400},
		"braces in text":   {`{"Job":null,"x":"` + strings.Repeat("{[\\\"", 30_000) + `"}`, 400},
	} {
		if r := w.do("PUT", "/v1/jobs", c.body); r.status != c.status || r.body == "" || len(r.body) > 200 {
			t.Errorf("%s: %d %.200s", what, r.status, r.body)
		}
	}
}

func TestGzipAndPretty(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	plain := w.get("/v1/node/" + gpuNode)
	r := w.do("GET", "/v1/node/"+gpuNode, "", "Accept-Encoding", "br, gzip")
	if r.header.Get("Content-Encoding") != "gzip" {
		t.Fatalf("headers %v", r.header)
	}
	z, err := gzip.NewReader(strings.NewReader(r.body))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(z); err != nil || string(b) != plain.body {
		t.Errorf("unpacked %q, %v", b, err)
	}
	for _, v := range []string{"", "br", "gzip;q=0"} {
		if r := w.do("GET", "/v1/node/"+gpuNode, "", "Accept-Encoding", v); r.header.Get("Content-Encoding") != "" {
			t.Errorf("packed for %q", v)
		}
	}
	if r := w.get("/v1/regions?pretty"); r.body != "[\n    \"global\"\n]\n" {
		t.Errorf("pretty: %q", r.body)
	}
}

func TestSearch(t *testing.T) {
	w := newWire(t)
	w.node(gpuNode)
	for i := range 25 {
		w.job("web-" + strconv.Itoa(10+i))
	}
	var res struct {
		Matches     map[string][]string
		Truncations map[string]bool
	}
	w.decoded(w.do("PUT", "/v1/search", `{"Prefix":"web","Context":"all"}`), &res)
	if len(res.Matches["jobs"]) != 20 || !res.Truncations["jobs"] || len(res.Matches["nodes"]) != 0 {
		t.Errorf("%s", pretty(t, res))
	}
	w.decoded(w.do("POST", "/v1/search", `{"Prefix":"0a1","Context":"nodes"}`), &res)
	if got := res.Matches["nodes"]; len(got) != 1 || got[0] != gpuNode || res.Truncations["nodes"] {
		t.Errorf("%s", pretty(t, res))
	}
	w.decoded(w.do("PUT", "/v1/search", `{"Prefix":"de","Context":"all"}`), &res)
	if got := res.Matches["namespaces"]; len(got) != 1 || got[0] != "default" {
		t.Errorf("%s", pretty(t, res))
	}
}

func TestMetrics(t *testing.T) {
	w := newWire(t)
	w.get("/v1/regions")
	m, _, err := w.client().Operator().MetricsSummary(nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Gauges) == 0 || len(m.Counters) == 0 || len(m.Samples) == 0 {
		t.Errorf("%d gauges, %d counters, %d samples", len(m.Gauges), len(m.Counters), len(m.Samples))
	}
	if r := w.get("/v1/metrics?format=prometheus"); !strings.Contains(r.body, `rxvision_http_requests_total{code="200",method="GET",route="/v1/regions"} 1`) {
		t.Errorf("prometheus: %s", r.body)
	}
	if r := w.get("/v1/metrics?format=bogus"); r.status != 400 {
		t.Errorf("bogus: %d", r.status)
	}
}

func FuzzRequests(f *testing.F) {
	for _, s := range [][3]string{
		{"GET", "/v1/jobs?per_page=1&next_token=a.b&reverse=true&filter=ID==1", ""},
		{"PUT", "/v1/jobs", `{"Job":{"ID":"a","TaskGroups":[{"Name":"g","Tasks":[{"Name":"t","Driver":"onnx","Config":{"model":"x"}}]}]}}`},
		{"PUT", "/v1/job/a/plan", `{"Job":{"ID":"a","TaskGroups":[null]}}`},
		{"PUT", "/v1/job/a/scale", `{"Count":1,"Target":{"Group":"g"}}`},
		{"GET", "/v1/nodes?prefix=0a&index=0", ""},
		{"PUT", "/v1/search", `{"Prefix":"0","Context":"all"}`},
		{"PUT", "/v1/node/" + gpuNode + "/drain", `{"DrainSpec":{"Deadline":-1}}`},
		{"DELETE", "/v1/job/a/b?purge", ""},
	} {
		f.Add(s[0], s[1], s[2])
	}
	f.Fuzz(func(t *testing.T, method, target, body string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || u.Query().Has("index") {
			return // it would wait
		}
		w := newServer(t)
		w.node(gpuNode)
		w.job("web")
		req := &http.Request{
			Method: method, URL: u, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), RequestURI: target,
			Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		}
		rec := &answers{header: http.Header{}}
		w.server.ServeHTTP(rec, req)
		if rec.status < 200 || rec.status > 599 {
			t.Errorf("%s %s: status %d", method, target, rec.status)
		}
		if strings.Contains(rec.body.String(), "internal error") {
			t.Errorf("%s %s panicked", method, target)
		}
	})
}

// answers is a plain ResponseWriter.
type answers struct {
	header http.Header
	status int
	body   strings.Builder
}

func (a *answers) Header() http.Header { return a.header }

func (a *answers) WriteHeader(status int) { a.status = status }

func (a *answers) Write(b []byte) (int, error) { return a.body.Write(b) }
