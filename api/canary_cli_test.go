package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

// canaries is webJob with canaries, in the version of a given memory.
func canaries(memory, update string) string {
	return strings.Replace(strings.Replace(webJob, "memory = 64", "memory = "+memory, 1), "update {", "update {\n"+update, 1)
}

// deployment gives a job's newest deployment once it holds.
func (c *cli) deployment(job, what string, holds func(*cluster.Deployment) bool) *cluster.Deployment {
	c.Helper()
	key := cluster.JobKey{Namespace: "default", ID: job}
	snap := c.until(what, func(snap *cluster.Snapshot) bool {
		d := snap.LatestDeployment(nil, key)
		return d != nil && holds(d)
	})
	return snap.LatestDeployment(nil, key)
}

// TestCommandLineCanaries takes a job through canaries as its users do: tried and promoted, tried and failed, promoted
// automatically, judged by hand.
func TestCommandLineCanaries(t *testing.T) {
	c := newCLI(t)
	c.until("the server says what it knows", func(snap *cluster.Snapshot) bool { return snap.Rules() == cluster.CurrentRules })
	healthy := func(version uint64, n int) func(*cluster.Deployment) bool {
		return func(d *cluster.Deployment) bool {
			return d.JobVersion == version && d.TaskGroups["g"].HealthyAllocs == n
		}
	}
	c.file("web.hcl", canaries("64", "canary = 1\nauto_revert = true"))
	c.run("job run web.hcl", "Status = successful")
	c.settled("web", 2)

	c.file("web.hcl", canaries("70", "canary = 1\nauto_revert = true"))
	c.fails(1, "job plan web.hcl", `+/- Task Group: "g" (1 canary, 2 ignore)`, "forces create/destroy update")
	c.run("job run -detach web.hcl")
	d := c.deployment("web", "a healthy canary", healthy(1, 1))
	c.run("deployment status "+d.ID[:8], "Status = running", "Description = Deployment is running but requires manual promotion", "g true false 2 1 1 1 0")
	c.run("job status web", "requires manual promotion", "g 1 run running", "g 0 run running")
	canary := c.store.State().Snapshot().Deployment(nil, d.ID).TaskGroups["g"].PlacedCanaries[0]
	c.run("alloc status "+canary, "Canary = true", "Deployment Health = healthy")
	c.fails(1, "deployment promote -group nope "+d.ID, `no task group "nope"`)
	c.fails(1, "job scale web g 4", "job scaling blocked due to active deployment")
	c.run("deployment pause "+d.ID, "paused")
	c.run("deployment resume -detach "+d.ID, "resumed")
	c.run("deployment promote -detach -group g " + d.ID)
	c.deployment("web", "success", func(d *cluster.Deployment) bool { return d.Status == cluster.DeploymentSuccessful })
	c.settled("web", 2)
	c.run("deployment status "+d.ID, "Status = successful", "g true true 2 1 2 2 0")
	if a := c.store.State().Snapshot().Alloc(nil, canary); a.Canary() || a.Terminal() {
		t.Errorf("after the promotion the canary is %s, %+v", a.ClientStatus, a.DeploymentStatus)
	}

	// Blue and green, promoted by the job's name; then one that is failed and goes back.
	c.file("web.hcl", canaries("80", "canary = 2\nauto_revert = true"))
	c.run("job run -detach web.hcl")
	c.deployment("web", "healthy canaries", healthy(2, 2))
	c.run("job promote -detach web", "Evaluation ID")
	c.settled("web", 2)
	c.file("web.hcl", canaries("90", "canary = 1\nauto_revert = true"))
	c.run("job run -detach web.hcl")
	d = c.deployment("web", "a healthy canary", healthy(3, 1))
	c.run("deployment fail -detach "+d.ID, "Auto-reverted to job version 2")
	c.run("deployment status "+d.ID, "Status = failed", "Deployment marked as failed - rolling back to job version 2")
	c.deployment("web", "the way back", func(d *cluster.Deployment) bool {
		return d.JobVersion == 4 && d.Status == cluster.DeploymentSuccessful
	})
	c.settled("web", 2)
	c.run("job inspect web", `"MemoryMB": 80`)

	c.file("web.hcl", canaries("100", "canary = 1\nauto_promote = true"))
	c.run("job run web.hcl", "Status = successful")
	c.settled("web", 2)

	// An operator judges.
	c.file("web.hcl", canaries("110", "canary = 1\nhealth_check = \"manual\""))
	c.run("job run -detach web.hcl")
	d = c.deployment("web", "a canary", func(d *cluster.Deployment) bool { return d.JobVersion == 6 && d.TaskGroups["g"].PlacedAllocs == 1 })
	c.fails(1, "deployment promote "+d.ID, `Task group "g" has 0/1 healthy allocations`)
	client, err := nomad.NewClient(&nomad.Config{Address: c.url})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	judge := func(healthy, unhealthy []string) error {
		_, _, err := client.Deployments().SetAllocHealth(d.ID, healthy, unhealthy, nil)
		return err
	}
	ids := d.TaskGroups["g"].PlacedCanaries
	if err := errors.Join(judge(ids, nil), judge(nil, ids), judge(ids, nil)); err != nil {
		t.Error(err)
	}
	if judge(nil, nil) == nil || judge(ids, ids) == nil || judge([]string{"nope"}, nil) == nil {
		t.Error("no health, both at once, or of an unknown allocation was set")
	}
	c.run("deployment promote -detach " + d.ID)
	c.run("deployment fail -detach " + d.ID)
	c.run("job stop -purge -detach web")
}

// TestCommandLineTags names versions, compares with them and goes back to one.
func TestCommandLineTags(t *testing.T) {
	c := newCLI(t)
	c.file("web.hcl", webJob)
	c.run("job run -detach web.hcl")
	c.settled("web", 2)
	c.run("job tag apply -name gold -description good web", `Job version 0 tagged with name "gold"`)
	c.file("web.hcl", canaries("70", ""))
	c.run("job run -detach web.hcl")
	c.settled("web", 2)
	c.run("job tag apply -name newest -version 1 web")
	c.fails(1, "job tag apply -name gold -version 1 web", `tag "gold" already exists on a different version of job "web"`)
	c.run("job history web", "Tag Name = gold", "Tag Description = good", "Tag Name = newest")
	c.run("job history -p -diff-tag gold -version 1 web", `+/- MemoryMB: "64" => "70"`)
	c.fails(1, "job history -p -diff-tag nope web", `tag "nope" not found on job "web"`)
	c.run("job revert -detach web gold", "Evaluation ID")
	c.settled("web", 2)
	c.run("job inspect web", `"MemoryMB": 64`)
	c.run("job tag unset -name gold web", `Tag "gold" removed from job "web"`)
	c.fails(1, "job tag unset -name gold web", `not found`)
}

// TestCommandLineScaling changes a count within the bounds of its scaling block, and shows what became of it.
func TestCommandLineScaling(t *testing.T) {
	c := newCLI(t)
	c.until("the server says what it knows", func(snap *cluster.Snapshot) bool { return snap.Rules() == cluster.CurrentRules })
	c.file("web.hcl", strings.Replace(webJob, "count = 2", `count = 2
    scaling {
      min = 1
      max = 3
      policy {
        cooldown = "1m"
        check "busy" {
          query = "gpu"
        }
      }
    }`, 1))
	c.fails(1, "job plan -verbose web.hcl", `+ Scaling { + Enabled: "true" + Max: "3" + Min: "1" + Type: "horizontal" }`)
	c.run("job run -detach web.hcl")
	c.settled("web", 2)
	c.fails(1, "job scale web g 4", "group count was greater than scaling policy maximum: 4 > 3")
	c.fails(1, "job scale web g 0", "group count was less than scaling policy minimum: 0 < 1")
	c.run("job scale -detach web g 3", "Evaluation ID")
	c.settled("web", 3)
	c.run("job scaling-events -verbose web", "g 3 2 false")
	c.run("scaling policy list", "true horizontal")
	id := cluster.ScalingPolicyID(cluster.JobKey{Namespace: "default", ID: "web"}, "g")
	c.run("scaling policy info "+id, "Enabled = true", "Job:web", "cooldown", "query")
	c.run("scaling policy list -type nope", "No policies found")
	c.run("job inspect web", `"Max": 3`)
	c.run("job stop -detach -purge web")
	c.fails(1, "scaling policy info "+id, "no scaling policies with prefix or ID")
}

// autoscaler says of every policy the same.
type autoscaler struct {
	status *cluster.ScalingStatus
	err    error
}

func (a *autoscaler) ScalingStatus(context.Context, string) (*cluster.ScalingStatus, error) {
	return a.status, a.err
}

// TestScalingStatus shows with a policy how the leader found it, and the CLI what it always shows.
func TestScalingStatus(t *testing.T) {
	fake := &autoscaler{}
	c := newCLI(t, func(cfg *api.Config) { cfg.Autoscaler = fake })
	c.until("the server says what it knows", func(snap *cluster.Snapshot) bool { return snap.Rules() == cluster.CurrentRules })
	job := strings.Replace(webJob, "count = 2", `count = 2
    scaling {
      min = 1
      max = 3
      policy {
        check "busy" {
          source = "rxvision"
          query  = "gpu"
          strategy "target-value" { target = 50 }
        }
      }
    }`, 1)
	c.file("web.hcl", job)
	c.fails(1, "job plan web.hcl", `check.busy.query: no task asks for a GPU: "gpu" will be missing`)
	c.run("job run -detach web.hcl")
	id := cluster.ScalingPolicyID(cluster.JobKey{Namespace: "default", ID: "web"}, "g")
	wants := func(status, text string) {
		t.Helper()
		resp, err := http.Get(c.url + "/v1/scaling/policy/" + id)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var p struct{ ID, Status, StatusDescription string }
		if err := json.NewDecoder(resp.Body).Decode(&p); err != nil || p.ID != id || p.Status != status || !strings.Contains(p.StatusDescription, text) {
			t.Errorf("%s: %+v, error %v; want %s: %s", resp.Status, p, err, status, text)
		}
	}
	wants(cluster.ScalingUnknown, "has not looked at it yet")
	fake.status = &cluster.ScalingStatus{State: cluster.ScalingMissing, Reason: "nothing has told of gpu", Count: 2}
	wants(cluster.ScalingMissing, "nothing has told of gpu")
	c.run("scaling policy info "+id, "Enabled = true", "Job:web", "target-value")
	fake.err = errors.New("away")
	wants(cluster.ScalingUnknown, "away")
	c.file("web.hcl", strings.Replace(job, "min = 1", "min = 1\n      enabled = false", 1))
	c.run("job run -detach web.hcl")
	wants(cluster.ScalingDisabled, "enabled is false")
}
