package api_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

const holdJob = `job "hold" {
  type = "batch"
  group "g" {
    count = 2
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sleep"
      }
      resources {
        cpu    = 100
        memory = 50
        device "nvidia/gpu" {}
      }
    }
  }
}
`

// TestCommandLineExplain fills the GPUs and asks why another team's job waits: with everything in sight, and with a token
// that may not see who holds them. What nomad prints of the same failure stands beside it.
func TestCommandLineExplain(t *testing.T) {
	c := newCLI(t, func(c *api.Config) { c.ACL.Enabled = true })
	token := func(n int, policy string) string {
		secret := fmt.Sprintf("5ec2e700-0000-4000-8000-%012x", n)
		tok := &cluster.ACLToken{AccessorID: fmt.Sprintf("acce5500-0000-4000-8000-%012x", n), SecretHash: acl.HashSecret(secret), Type: cluster.ACLTokenManagement}
		if policy != "" {
			name := fmt.Sprint("p", n)
			c.apply(&cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{{Name: name, Rules: policy}}})
			tok.Type, tok.Policies = cluster.ACLTokenClient, []string{name}
		}
		c.apply(&cluster.UpsertACLTokens{Tokens: []*cluster.ACLToken{tok}})
		return secret
	}
	manager, team := token(1, ""), token(2, `namespace "team" { policy = "write" }`)
	c.token = manager
	c.until("the server says what it knows", func(snap *cluster.Snapshot) bool { return snap.Rules() == cluster.CurrentRules })
	c.run("namespace apply team")
	c.file("hold.hcl", holdJob)
	c.run("job run -detach hold.hcl")
	c.settled("hold", 2)
	c.file("wait.hcl", strings.Replace(holdJob, `"hold" {`, "\"wait\" {\n  namespace = \"team\"", 1))
	c.token = team
	c.fails(1, "job plan wait.hcl", "failed to place 2 allocations", `Constraint "missing devices": 1 nodes excluded by filter`, `Dimension "devices: no devices match request" exhausted on 1 nodes`, `Class "test": 1 nodes excluded by filter`, `Class "test" exhausted on 1 nodes`)
	ask := func(method, path, secret, body string, status int) (x cluster.Explanation, text string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, c.url+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Nomad-Token", secret)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != status {
			t.Fatalf("%s %s: %d %s, %v", method, path, res.StatusCode, b, err)
		}
		if status == http.StatusOK {
			if err := json.Unmarshal(b, &x); err != nil {
				t.Fatal(err)
			}
		}
		return x, string(b)
	}
	const spec = `{"Job":{"ID":"wait","Namespace":"team","Type":"batch","Datacenters":["*"],"TaskGroups":[{"Name":"g","Count":2,"Tasks":[{"Name":"t","Driver":"raw_exec",
		"Config":{"command":"/bin/sleep"},"Resources":{"CPU":100,"MemoryMB":50,"Devices":[{"Name":"nvidia/gpu","Count":1}]}}]}]}}`
	before := c.store.State().Snapshot()
	x, text := ask(http.MethodPut, "/v1/jobs/what-if", team, spec, 200)
	after := c.store.State().Snapshot()
	if before.Index(nil) != after.Index(nil) || before.Hash() != after.Hash() {
		t.Error("asking what if has changed the state")
	}
	if x.Status != "" || x.Groups[0].Queued != 2 || strings.Contains(text, "hold") || strings.Contains(text, "gpu-host") {
		t.Errorf("what if: %s", text)
	}
	ask(http.MethodPut, "/v1/jobs/what-if", team, strings.Replace(spec, `"team"`, `"default"`, 1), 403)

	c.run("job run -detach wait.hcl")
	c.until("it waits", func(snap *cluster.Snapshot) bool {
		open := snap.OpenEvals(nil)
		return len(open) == 1 && open[0].Status == cluster.EvalStatusBlocked
	})
	c.run("job status -namespace team wait", "Placement Failure", `Constraint "missing devices": 1 nodes excluded by filter`, `Dimension "devices: no devices match request" exhausted on 1 nodes`)
	x, text = ask(http.MethodGet, "/v1/job/wait/explain?namespace=team", team, "", 200)
	if strings.Contains(text, "hold") || strings.Contains(text, "gpu-host") || strings.Contains(text, gpuID(0)) {
		t.Errorf("a team sees another's names: %s", text)
	}
	g := x.Groups[0]
	if len(g.Holders) != 1 || !g.Holders[0].Hidden || g.Holders[0].Jobs != 1 || g.Holders[0].Allocs != 2 || g.Holders[0].Milli != 2000 {
		t.Errorf("holders %s", pretty(t, g.Holders))
	}
	if !g.Preempt.Helps || g.Preempt.Victims[0].JobID != "" {
		t.Errorf("preemption %s", pretty(t, g.Preempt))
	}
	if q := x.Queue; q == nil || q.Position != 1 || q.Of != 1 || !q.Blocked {
		t.Errorf("queue %+v", q)
	}
	ask(http.MethodGet, "/v1/job/hold/explain", team, "", 403)
	x, _ = ask(http.MethodGet, "/v1/job/wait/explain?namespace=team", manager, "", 200)
	if h := x.Groups[0].Holders; len(h) != 1 || h[0].JobID != "hold" || h[0].Allocs != 2 || x.Groups[0].Shortages[0].Examples[0] != "gpu-host" {
		t.Errorf("holders %s", pretty(t, h))
	}
	x, _ = ask(http.MethodGet, "/v1/job/hold/explain", manager, "", 200)
	if g := x.Groups[0]; g.Running != 2 || g.Queued != 0 || g.Runs[0].NodeName != "gpu-host" || x.Queue != nil || g.Start != nil {
		t.Errorf("what runs: %s", pretty(t, x))
	}
	for path, says := range map[string]string{
		"/v1/job/hodl/explain": `did you mean "hold"?`, "/v1/job/wait/explain": `namespace "team" has it`,
	} {
		if _, text := ask(http.MethodGet, path, manager, "", 404); !strings.Contains(text, says) {
			t.Errorf("%s: %s", path, text)
		}
	}
	if _, text := ask(http.MethodGet, "/v1/job/hodl/explain?namespace=team", team, "", 404); strings.Contains(text, "hold") {
		t.Errorf("a name leaks: %s", text)
	}
}
