package api_test

import (
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestEveryRouteHasItsDecision compares the table with the list that was decided. A
// new route fails until its line is there: write it yourself or run
// `go test ./api -run TestEveryRouteHasItsDecision -update`, and look at it.
func TestEveryRouteHasItsDecision(t *testing.T) {
	const file = "testdata/access.txt"
	var got strings.Builder
	for _, r := range api.Routes() {
		fmt.Fprintln(&got, r)
		if r.Place == "" {
			t.Errorf("%s %s has no decision", r.Method, r.Pattern)
		}
		silent := r.Place == "open" || r.Place == "own" || r.Place == "visible"
		if silent == (len(r.AnyOf) > 0) && r.Place != "visible" {
			t.Errorf("%s: capabilities do not fit the place", r)
		}
		for _, set := range r.AnyOf {
			for _, c := range set {
				if !acl.Known(c) {
					t.Errorf("%s: capability %q is not known", r, c)
				}
			}
		}
	}
	if *update {
		if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		has, decided := strings.Split(got.String(), "\n"), strings.Split(string(want), "\n")
		for _, line := range has {
			if !slices.Contains(decided, line) {
				t.Errorf("in the table and not decided: %s", line)
			}
		}
		for _, line := range decided {
			if !slices.Contains(has, line) {
				t.Errorf("decided and not in the table: %s", line)
			}
		}
		t.Errorf("the table differs from %s", file)
	}
}

// guarded is a server with access control, and what routes may name.
type guarded struct {
	*wire
	tokens int
}

const (
	devAlloc, devEval, devDeployment = "a0000000-0000-4000-8000-00000000de01", "e0000000-0000-4000-8000-00000000de01", "d0000000-0000-4000-8000-00000000de01"
	webAlloc, webDeployment          = "a0000000-0000-4000-8000-00000000ee01", "d0000000-0000-4000-8000-00000000ee01"
)

func newGuarded(t *testing.T) *guarded {
	g := &guarded{wire: newServer(t, func(c *api.Config) { c.ACL.Enabled = true })}
	g.node(gpuNode)
	g.job("web")
	g.alloc(webAlloc, "web", gpuNode, webDeployment)
	g.apply(&cluster.UpsertNamespaces{Namespaces: []*cluster.Namespace{{Name: "dev"}}})
	g.copyWeb()
	for _, name := range []string{"fashion", "secret"} {
		if r := g.ask("PUT", "/v1/models/"+name, "bytes of "+name, g.manager()); r.status != 200 {
			t.Fatalf("push: %d %s", r.status, r.body)
		}
	}
	return g
}

// copyWeb copies the job web and what it has into the namespace dev as job hidden. It
// is done as a restore would, which is short.
func (g *guarded) copyWeb() {
	g.Helper()
	restore := cluster.NewRestore()
	add := func(t *cluster.Table, record any) {
		g.Helper()
		if err := restore.Add(t, cluster.Marshal(record)); err != nil {
			g.Fatal(err)
		}
	}
	var evals, deployments *cluster.Table
	err := g.store.State().Snapshot().Records(func(t *cluster.Table, _ string, record any) error {
		add(t, record)
		switch t.Name {
		case cluster.TableEvals:
			evals = t
		case cluster.TableDeployments:
			deployments = t
		}
		switch r := record.(type) {
		case *cluster.Job:
			c := cluster.Clone(r)
			c.Namespace, c.ID, c.Name = "dev", "hidden", "hidden"
			add(t, c)
		case *cluster.JobSummary:
			c := cluster.Clone(r)
			c.Namespace, c.JobID = "dev", "hidden"
			add(t, c)
		case *cluster.Allocation:
			c := cluster.Clone(r)
			c.Namespace, c.JobID, c.EvalID, c.DeploymentID, c.ID = "dev", "hidden", devEval, devDeployment, devAlloc
			add(t, c)
		}
		return nil
	})
	if err != nil {
		g.Fatal(err)
	}
	snap := g.store.State().Snapshot()
	for _, e := range snap.Evals(nil, "") {
		c := cluster.Clone(e)
		c.Namespace, c.JobID, c.ID = "dev", "hidden", devEval
		add(evals, c)
	}
	for _, d := range snap.Deployments(nil, "") {
		c := cluster.Clone(d)
		c.Namespace, c.JobID, c.ID = "dev", "hidden", devDeployment
		add(deployments, c)
	}
	state, err := restore.Done()
	if err != nil {
		g.Fatal(err)
	}
	g.store.mu.Lock()
	defer g.store.mu.Unlock()
	g.store.state = state
}

// token makes a token with the rules; "" makes a manager.
func (g *guarded) token(rules string) string {
	g.Helper()
	g.tokens++
	secret := fmt.Sprintf("5ec2e700-0000-4000-8000-%012x", g.tokens)
	t := &cluster.ACLToken{
		AccessorID: fmt.Sprintf("acce5500-0000-4000-8000-%012x", g.tokens), SecretHash: acl.HashSecret(secret),
		Type: cluster.ACLTokenManagement,
	}
	if rules != "" {
		if _, err := acl.Parse(rules); err != nil {
			g.Fatalf("%s\n%v", rules, err)
		}
		name := fmt.Sprintf("p-%d", g.tokens)
		g.apply(&cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{{Name: name, Rules: rules}}})
		t.Type, t.Policies = cluster.ACLTokenClient, []string{name}
	}
	g.apply(&cluster.UpsertACLTokens{Tokens: []*cluster.ACLToken{t}})
	return secret
}

// expired makes a manager's token that ended long ago.
func (g *guarded) expired() string {
	g.Helper()
	const secret = "5ec2e700-0000-4000-8000-00000000dead"
	cmd := &cluster.UpsertACLTokens{
		Stamp: cluster.Stamp{RequestID: "expired", Time: 1e18},
		Tokens: []*cluster.ACLToken{{
			AccessorID: "acce5500-0000-4000-8000-00000000dead", SecretHash: acl.HashSecret(secret), Type: cluster.ACLTokenManagement, ExpirationTime: 1e18 + 1,
		}},
	}
	g.store.mu.Lock()
	defer g.store.mu.Unlock()
	g.store.index++
	if res, err := g.store.state.Apply(g.store.index, cluster.EncodeCommand(cmd)); err != nil || res.Err != nil {
		g.Fatal(err, res.Err)
	}
	return secret
}

func (g *guarded) manager() string { return g.token("") }

// ask sends a request with a token, without a listener.
func (g *guarded) ask(method, path, body, secret string) reply {
	g.Helper()
	r := httptest.NewRequest(method, "http://127.0.0.1"+path, strings.NewReader(body))
	if secret != "" {
		r.Header.Set("X-Nomad-Token", secret)
	}
	w := httptest.NewRecorder()
	g.server.ServeHTTP(w, r)
	return reply{w.Code, w.Result().Header, w.Body.String()}
}

// every is all that a policy can grant, and where.
var every = map[string][]string{
	"namespace": {
		"list-jobs", "read-job", "submit-job", "dispatch-job", "scale-job", "parse-job", "read-logs", "read-fs", "alloc-exec", "alloc-node-exec",
		"alloc-lifecycle", "read-scaling-policy", "list-scaling-policies", "read-job-scaling", "csi-list-volume", "csi-read-volume",
		"csi-write-volume", "csi-mount-volume", "csi-register-plugin", "submit-recommendation", "sentinel-override", "host-volume-read",
	},
	"variables": {"list", "read", "write", "destroy"}, "node_pool": {"read", "write", "delete"}, "model": {"read", "infer", "push", "alias"},
	"host_volume": {"mount-readonly", "mount-readwrite"},
	"node":        {"read", "write"}, "agent": {"read", "write"}, "operator": {"read", "write"}, "quota": {"read", "write"}, "plugin": {"list", "read"},
}

// granting writes a policy with the capabilities for which keep holds, everywhere.
func granting(keep func(acl.Capability) bool) string {
	var b strings.Builder
	var variables string
	for _, block := range []string{"variables", "namespace", "node_pool", "model", "host_volume"} {
		var caps []string
		for _, name := range every[block] {
			c := acl.Capability(block + ":" + name)
			if block == "namespace" {
				c = acl.Capability(name)
			}
			if keep(c) {
				caps = append(caps, fmt.Sprintf("%q", name))
			}
		}
		list := strings.Join(caps, ", ")
		switch {
		case block == "variables":
			if list != "" {
				variables = fmt.Sprintf("variables {\n path \"*\" { capabilities = [%s] }\n }\n", list)
			}
		case block == "namespace":
			fmt.Fprintf(&b, "namespace \"*\" {\n capabilities = [%s]\n%s}\n", list, variables)
		case list != "":
			fmt.Fprintf(&b, "%s \"*\" { capabilities = [%s] }\n", block, list)
		}
	}
	for _, block := range []string{"node", "agent", "operator", "quota", "plugin"} {
		policy := "" // reading comes with writing
		for _, name := range every[block] {
			if !keep(acl.Capability(block + ":" + name)) {
				break
			}
			policy = name
		}
		if policy != "" {
			fmt.Fprintf(&b, "%s { policy = %q }\n", block, policy)
		}
	}
	return b.String()
}

// example makes a request of a route that names what is there.
func (g *guarded) example(r api.Route) (method, path, body string) {
	g.Helper()
	method, path = r.Method, r.Pattern
	if method == "" {
		method = http.MethodPut
	}
	id := map[string]string{"alloc": webAlloc, "eval": evalID(2), "deployment": webDeployment}[r.Place]
	if id == "" {
		id = gpuNode
	}
	digest := ""
	for _, v := range g.store.State().Snapshot().ModelVersions(nil, "fashion") {
		digest = v.Digest
	}
	path = strings.NewReplacer(
		"*job", "web", ":id", id, ":pool", "default", ":model", "fashion", ":alias", "production", ":version", "1", ":digest", digest,
		":name", "default", ":accessor", "acce5500-0000-4000-8000-00000000ffff", "*path", "a/b", "*what", "x", "*op", "x", ":what", "x", ":profile", "heap", ":op", "x", ":tag", "t", ":role", "node",
	).Replace(path)
	if strings.Contains(path, "/:") || strings.Contains(path, "/*") {
		g.Fatalf("%s: no example of %s", r, path)
	}
	if method == http.MethodPut {
		body = "{}"
	}
	if r.Place == "body" {
		body = pretty(g.T, map[string]any{"Job": sleeper("web")})
	}
	return method, path, body
}

// TestEveryRouteIsGuarded asks every route without a token, with bad ones, with all
// capabilities but the needed ones, and with just those.
func TestEveryRouteIsGuarded(t *testing.T) {
	for _, route := range api.Routes() {
		t.Run(strings.ReplaceAll(route.Method+route.Pattern, "/", "_"), func(t *testing.T) {
			g := newGuarded(t)
			method, path, body := g.example(route)
			needed := map[acl.Capability]bool{}
			for _, set := range route.AnyOf {
				for _, c := range set {
					needed[c] = true
				}
			}
			denies := func(what, secret, text string) {
				t.Helper()
				if r := g.ask(method, path, body, secret); r.status != 403 || r.body != text {
					t.Errorf("%s: %s %s gave %d %q, want 403 %q", what, method, path, r.status, r.body, text)
				}
			}
			passes := func(what, secret string) {
				t.Helper()
				if r := g.ask(method, path, body, secret); r.status == 403 || r.status == 500 && strings.Contains(r.body, "decision") {
					t.Errorf("%s: %s %s gave %d %q", what, method, path, r.status, r.body)
				}
			}
			if route.Place != "open" {
				denies("an unknown token", "00000000-0000-4000-8000-000000000000", "ACL token not found")
				denies("no token at all", "x", "ACL token not found")
				denies("half a token", g.manager()[:18], "ACL token not found")
				denies("an expired token", g.expired(), "ACL token not found")
			}
			if guarded := route.Place != "open" && route.Place != "own" && route.Place != "visible"; guarded {
				denies("nobody", "", "Permission denied")
				if slices.ContainsFunc(route.AnyOf, func(set []acl.Capability) bool { return slices.Contains(set, acl.AnyInNamespace) }) {
					denies("no capability in a namespace", g.token(`node { policy = "write" }`), "Permission denied")
				} else {
					denies("all but the needed", g.token(granting(func(c acl.Capability) bool { return !needed[c] })), "Permission denied")
				}
			} else if route.Place != "own" {
				passes("nobody", "")
			}
			for _, set := range route.AnyOf {
				switch {
				case slices.Contains(set, acl.Management):
					denies("all that a policy can give", g.token(granting(func(acl.Capability) bool { return true })), "Permission denied")
				case slices.Contains(set, acl.AnyInNamespace):
					passes("some capability", g.token(`namespace "default" { capabilities = ["csi-read-volume"] }`))
				default:
					passes(fmt.Sprint("just ", set), g.token(granting(func(c acl.Capability) bool {
						// a level is reached through those below it
						kind, name, _ := strings.Cut(string(c), ":")
						return slices.Contains(set, c) || name == "read" && slices.Contains(set, acl.Capability(kind+":write")) && len(every[kind]) == 2
					})))
				}
			}
			passes("a manager", g.manager())
		})
	}
}

// TestObjectsOfOtherNamespaces asks for what is in dev with every right in default,
// in all the ways in which a request can name it.
func TestObjectsOfOtherNamespaces(t *testing.T) {
	g := newGuarded(t)
	outsider := g.token(`namespace "default" { policy = "write" } node { policy = "write" }`)
	insider := g.token(`namespace "dev" { policy = "write" } node { policy = "write" }`)
	for _, path := range []string{
		"/v1/allocation/" + devAlloc, "/v1/allocation/" + strings.ToUpper(devAlloc), "/v1/evaluation/" + devEval, "/v1/evaluation/" + devEval + "/allocations",
		"/v1/deployment/" + devDeployment, "/v1/deployment/allocations/" + devDeployment,
		"/v1/client/fs/ls/" + devAlloc, "/v1/client/fs/logs/" + devAlloc + "?task=t&type=stdout", "/v1/client/allocation/" + devAlloc + "/stats",
		"PUT /v1/allocation/" + devAlloc + "/stop", "PUT /v1/client/allocation/" + devAlloc + "/restart", "PUT /v1/client/allocation/" + devAlloc + "/signal",
		"PUT /v1/deployment/fail/" + devDeployment, "PUT /v1/deployment/pause/" + devDeployment, "PUT /v1/deployment/promote/" + devDeployment,
	} {
		method, path, ok := strings.Cut(path, " ")
		if !ok {
			method, path = "GET", method
		}
		for _, query := range []string{"", "namespace=default", "namespace=*", "namespace=dev"} {
			at := path
			if query != "" {
				sign := "?"
				if strings.Contains(path, "?") {
					sign = "&"
				}
				at += sign + query
			}
			if r := g.ask(method, at, `{"Signal":"SIGHUP"}`, outsider); r.status != 403 {
				t.Errorf("outsider: %s %s gave %d %s", method, at, r.status, r.body)
			}
		}
		if r := g.ask(method, path, `{"Signal":"SIGHUP"}`, insider); r.status == 403 {
			t.Errorf("insider: %s %s gave %d %s", method, path, r.status, r.body)
		}
	}
	if g.store.State().Snapshot().Alloc(nil, devAlloc).DesiredTransition.Migrate == nil {
		t.Error("the insider's stop did nothing")
	}
	if asked := g.nodes.asked(); asked != "restart , signal  SIGHUP" {
		t.Errorf("nodes were asked: %s", asked)
	}
	for _, path := range []string{
		"/v1/job/hidden", "/v1/job/hidden/allocations", "/v1/job/hidden/evaluations", "/v1/job/hidden/summary", "/v1/job/hidden/versions", "/v1/jobs", "/v1/allocations", "/v1/evaluations", "/v1/deployments", "/v1/evaluations/count",
	} {
		if r := g.ask("GET", path+"?namespace=dev", "", outsider); r.status != 403 {
			t.Errorf("outsider: %s gave %d %s", path, r.status, r.body)
		}
		if r := g.ask("GET", path+"?namespace=dev", "", insider); r.status != 200 {
			t.Errorf("insider: %s gave %d %s", path, r.status, r.body)
		}
	}
}

// TestListsShowWhatMayBeSeen asks for the lists of all namespaces.
func TestListsShowWhatMayBeSeen(t *testing.T) {
	g := newGuarded(t)
	token := g.token(`namespace "default" { policy = "read" } node { policy = "read" } node_pool "all" { policy = "read" } model "fashion" { policy = "read" }`)
	nothing := g.token(`quota { policy = "read" }`)
	for path, want := range map[string]string{
		"/v1/jobs": "web", "/v1/allocations": webAlloc, "/v1/deployments": webDeployment, "/v1/node/" + gpuNode + "/allocations": webAlloc,
	} {
		if got := g.ids(g.ask("GET", path+"?namespace=*", "", token), "ID"); got != want {
			t.Errorf("%s shows %s, want %s", path, got, want)
		}
	}
	for path, want := range map[string]string{"/v1/namespaces": "default", "/v1/node/pools": "all", "/v1/models": "fashion"} {
		if got := g.ids(g.ask("GET", path, "", token), "Name"); got != want {
			t.Errorf("%s shows %s, want %s", path, got, want)
		}
	}
	for path, want := range map[string]string{"/v1/namespaces": "[]", "/v1/node/pools": "[]", "/v1/vars": "[]"} {
		g.wants(path+" for nobody", g.ask("GET", path, "", nothing), 200, want)
	}
	g.wants("jobs of all namespaces for who has none", g.ask("GET", "/v1/jobs?namespace=*", "", nothing), 403, "Permission denied")
	var count struct{ Count int }
	g.decoded(g.ask("GET", "/v1/evaluations/count?namespace=*", "", token), &count)
	all := count
	g.decoded(g.ask("GET", "/v1/evaluations/count?namespace=*", "", g.manager()), &all)
	if count.Count == 0 || count.Count >= all.Count {
		t.Errorf("%d of %d evaluations counted", count.Count, all.Count)
	}
	var found struct{ Matches map[string][]string }
	g.decoded(g.ask("PUT", "/v1/search?namespace=*", `{"Prefix":"","Context":"all"}`, token), &found)
	m := found.Matches
	if fmt.Sprint(m["jobs"], m["allocs"], m["deployment"], m["namespaces"], m["node_pools"], len(m["nodes"])) != fmt.Sprint([]string{"web"}, []string{webAlloc}, []string{webDeployment}, []string{"default"}, []string{"all"}, 1) {
		t.Errorf("search finds %s", pretty(t, m))
	}
	g.decoded(g.ask("PUT", "/v1/search?namespace=*", `{"Prefix":"","Context":"all"}`, nothing), &found)
	for kind, ids := range found.Matches {
		if len(ids) > 0 {
			t.Errorf("search finds %s %v for nobody", kind, ids)
		}
	}
}

// TestJobsAreJudgedByTheirOwnNamespace registers, plans and checks jobs whose body
// and query name different namespaces.
func TestJobsAreJudgedByTheirOwnNamespace(t *testing.T) {
	g := newGuarded(t)
	writer := g.token(`namespace "default" { policy = "write" }`)
	body := func(namespace *string, id string) string {
		j := sleeper(id)
		j.Namespace = namespace
		return pretty(t, map[string]any{"Job": j})
	}
	dev, def, none := "dev", "default", ""
	for _, path := range []string{"/v1/jobs", "/v1/job/x", "/v1/job/x/plan", "/v1/validate/job"} {
		for _, test := range []struct {
			query string
			of    *string
			want  bool
		}{{"", nil, true}, {"", &def, true}, {"", &none, true}, {"", &dev, false}, {"?namespace=default", &dev, false}, {"?namespace=dev", nil, false}, {"?namespace=*", &dev, false}, {"?namespace=dev", &dev, false}} {
			r := g.ask("PUT", path+test.query, body(test.of, "x"), writer)
			if allowed := r.status != 403; allowed != test.want {
				t.Errorf("%s%s of a job in %v: %d %s", path, test.query, test.of, r.status, r.body)
			}
		}
	}
	if g.store.State().Snapshot().Job(nil, cluster.JobKey{Namespace: "dev", ID: "x"}) != nil {
		t.Error("a job came to dev")
	}
	served := nomad.NewServiceJob("m", "m", region, 50).AddTaskGroup(nomad.NewTaskGroup("g", 1).AddTask(
		nomad.NewTask("t", "onnx").SetConfig("model", "fashion").Require(&nomad.Resources{CPU: ptr(100), MemoryMB: ptr(64)})))
	text := pretty(t, map[string]any{"Job": served})
	const why = `Permission denied: task t of group g serves model "fashion", which needs model:read`
	g.wants("a model that may not be read", g.ask("PUT", "/v1/jobs", text, writer), 403, why)
	g.wants("planning it", g.ask("PUT", "/v1/job/m/plan", text, writer), 403, why)
	both := g.token(`namespace "default" { policy = "write" } model "fash*" { policy = "read" }`)
	if r := g.ask("PUT", "/v1/jobs", text, both); r.status != 200 {
		t.Errorf("a model that may be read: %d %s", r.status, r.body)
	}
}

func TestModelsAndArtifactsAreGuarded(t *testing.T) {
	g := newGuarded(t)
	token := g.token(`model "fashion" { policy = "read" } model "new-*" { capabilities = ["push"] }`)
	digest := func(model string) string {
		return "/v1/artifacts/" + g.store.State().Snapshot().ModelVersion(nil, model, 1).Digest
	}
	for path, want := range map[string]int{
		"GET /v1/models/fashion": 200, "GET /v1/models/secret": 403, "GET /v1/models/nothing": 403, "PUT /v1/models/fashion": 403, "PUT /v1/models/new-one": 200,
		"GET /v1/models/new-one": 403, "PUT /v1/models/fashion/alias/production": 403, "GET " + digest("fashion"): 200, "GET " + digest("secret"): 404,
		"GET /v1/artifacts/sha256:" + strings.Repeat("0", 64): 404,
	} {
		method, path, _ := strings.Cut(path, " ")
		if r := g.ask(method, path, `{"Version":1}`, token); r.status != want {
			t.Errorf("%s %s: %d %s, want %d", method, path, r.status, r.body, want)
		}
	}
}
