package api_test

import (
	"net/http"
	"strings"
	"testing"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

const teamQuota = `name        = "team"
description = "What the team may hold"

limit {
  region = "global"
  region_limit {
    cores      = 0
    cpu        = 250
    memory     = 1000
    memory_max = 1000
    device "nvidia/gpu" {
      count = 2
    }
  }
}
`

const teamJob = `job "train" {
  namespace = "team"
  type      = "batch"
  group "g" {
    count = 3
    task "t" {
      driver = "raw_exec"
      config {
        command = "/bin/sleep"
      }
      resources {
        cpu    = 100
        memory = 50
      }
    }
  }
}
`

// TestCommandLineTenants makes a namespace with a quota, fills it and takes it down, as users of the command line do.
func TestCommandLineTenants(t *testing.T) {
	c := newCLI(t)
	c.until("the server says what it knows", func(snap *cluster.Snapshot) bool { return snap.Rules() == cluster.CurrentRules })
	c.run("namespace list", "default Default shared namespace")
	c.fails(1, "namespace apply -quota team team", `namespace "team" using non-existent quota "team"`)
	c.file("team.hcl", teamQuota)
	c.run("quota apply team.hcl", `Successfully applied quota specification "team"!`)
	c.run("quota list", "team What the team may hold")
	c.run("quota init spec.hcl")
	c.fails(1, "quota apply spec.hcl", "region_limit.storage.variables: is not supported yet")
	c.file("bad.json", `{"Name":"bad","Limits":[{"Region":"mars","RegionLimit":{"CPU":1,"Cores":2}}]}`)
	c.fails(1, "quota apply -json bad.json", `limit[0].region: "mars" is not the region of these servers, which is "global"`, "limit[0].region_limit.cores: is not supported yet")
	c.run("namespace apply -description Trainers -quota team team", `Successfully applied namespace "team"!`)
	c.file("ns.hcl", "name = \"team\"\ndescription = \"Trainers\"\nquota = \"team\"\nmeta {\n  rx_cohor = \"ml\"\n}\n")
	c.fails(1, "namespace apply ns.hcl", `meta.rx_cohor: unknown key "rx_cohor"; did you mean "rx_cohort"?`)
	c.file("ns.hcl", "name = \"team\"\ndescription = \"Trainers\"\nquota = \"team\"\nmeta {\n  rx_cohort = \"ml\"\n}\ncapabilities {\n  disabled_task_drivers = [\"exec\"]\n}\n")
	c.run("namespace apply ns.hcl")
	c.run("namespace status team", "Name = team", "Description = Trainers", "rx_cohort = ml", "Disabled Drivers = exec", "global 0 / 250")
	c.run("namespace inspect team", `"Quota": "team"`)

	c.file("lost.hcl", strings.Replace(teamJob, `"team"`, `"lost"`, 1))
	c.fails(1, "job run lost.hcl", `nonexistent namespace "lost"`)
	c.file("train.hcl", teamJob)
	c.fails(1, "job plan train.hcl", "failed to place 1 allocation", `Quota limit hit "cpu exhausted (300 needed > 250 limit)"`)
	c.run("job run -detach train.hcl")
	snap := c.until("two of three run and the third waits", func(snap *cluster.Snapshot) bool {
		n := 0
		for _, a := range snap.AllocsByJob(nil, cluster.JobKey{Namespace: "team", ID: "train"}) {
			if a.ClientStatus == cluster.AllocClientRunning {
				n++
			}
		}
		return n == 2 && len(snap.OpenEvals(nil)) == 1
	})
	c.run("job status -namespace team train", "Placement Failure", `Quota limit hit "cpu exhausted (300 needed > 250 limit)"`)
	c.run("eval status -namespace team "+snap.OpenEvals(nil)[0].ID, "Status = blocked", "Quota Limit Reached = team")
	c.run("quota status team", "global 200 / 250 0 / - 100 / 1000 100 / 1000", "global nvidia/gpu 0 / 2")
	c.run("quota inspect team", `"CPU": 200`, `"Name": "nvidia/gpu"`)
	c.file("team.hcl", strings.Replace(teamQuota, "250", "300", 1))
	c.run("quota apply team.hcl")
	c.until("the third runs by the greater quota", func(snap *cluster.Snapshot) bool {
		return len(snap.AllocsByJob(nil, cluster.JobKey{Namespace: "team", ID: "train"})) == 3
	})
	c.fails(1, "namespace delete team", `namespace "team" has 3 allocations that have not ended`)
	c.fails(1, "quota delete team", `quota "team" is used by 1 namespaces: team`)
	c.run("job stop -detach -namespace team train")
	c.until("all have ended", func(snap *cluster.Snapshot) bool {
		j := snap.Job(nil, cluster.JobKey{Namespace: "team", ID: "train"})
		return snap.Usage(nil, "team").Allocs == 0 && j != nil && j.Status == cluster.JobStatusDead
	})
	c.run("namespace delete team", `Successfully deleted namespace "team"!`)
	c.run("quota delete team", `Successfully deleted quota "team"!`)
	c.fails(1, "namespace delete default", "can not delete default namespace")
	c.fails(1, "namespace inspect team", `Namespace "team" matched no namespaces`)
}

// TestQuotaWire reads quotas and usage as clients do that do not print all: devices.
func TestQuotaWire(t *testing.T) {
	w := newWire(t)
	w.knows("s", cluster.CurrentRules)
	quotas := w.client().Quotas()
	if _, err := quotas.Register(&nomad.QuotaSpec{Name: "q", Limits: []*nomad.QuotaLimit{{Region: region, RegionLimit: &nomad.QuotaResources{
		Devices: []*nomad.RequestedDevice{{Name: "nvidia/gpu", Count: ptr(uint64(3))}, {Name: "nvidia/gpu-mib", Count: ptr(uint64(9))}},
	}}}}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := w.client().Namespaces().Register(&nomad.Namespace{Name: "x", Quota: "q"}, nil); err != nil {
		t.Fatal(err)
	}
	spec, _, err := quotas.Info("q", nil)
	if err != nil || len(spec.Limits) != 1 || len(spec.Limits[0].Hash) == 0 || *spec.Limits[0].RegionLimit.Devices[0].Count != 3 {
		t.Fatalf("%s, %v", pretty(t, spec), err)
	}
	list, _, err := quotas.ListUsage(nil)
	if err != nil || len(list) != 1 || len(list[0].Used) != 1 {
		t.Fatalf("%s, %v", pretty(t, list), err)
	}
	for _, c := range []struct {
		method, path, body string
		status             int
		says               string
	}{
		{http.MethodGet, "/v1/quota/none", "", 404, "quota not found"},
		{http.MethodGet, "/v1/quota/usage/none", "", 404, "quota not found"},
		{http.MethodGet, "/v1/namespace/none", "", 404, "Namespace not found"},
		{http.MethodPut, "/v1/namespace/x", `{"Name":"y"}`, 400, "does not match"},
		{http.MethodPut, "/v1/namespace", `{"Name":"y","VaultConfiguration":{"Default":"v"}}`, 500, "vault: is not supported yet"},
		{http.MethodPut, "/v1/quota", `{"Name":"q"}`, 500, "must provide at least one quota limit"},
		{http.MethodDelete, "/v1/namespace/none", "", 500, `namespace "none" not found`},
		{http.MethodDelete, "/v1/quota/q", "", 500, `quota "q" is used by 1 namespaces: x`},
	} {
		if r := w.do(c.method, c.path, c.body); r.status != c.status || !strings.Contains(r.body, c.says) {
			t.Errorf("%s %s: %d %q, want %d %q", c.method, c.path, r.status, r.body, c.status, c.says)
		}
	}
}
