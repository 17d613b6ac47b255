package fleet

import (
	"maps"
	"testing"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// TestRoutesOfCanaries: until canaries are promoted, aliases and requests that name no version mean what they are to
// replace; who asks for the version's number reaches them. Canaries of the same version are replicas like others.
func TestRoutesOfCanaries(t *testing.T) {
	f := start(t, Config{})
	f.attach(nodeA)
	f.push("fashion", 1)
	f.push("fashion", 2)
	f.must(&cluster.SetAlias{Model: "fashion", Alias: "production", Version: 2})
	f.must(&cluster.SetAlias{Model: "fashion", Alias: "old", Version: 1})
	serve := func(id string, version uint64) {
		f.must(&cluster.UpdateAllocs{Allocs: []*cluster.Allocation{{
			ID: id, ClientStatus: cluster.AllocClientRunning, Serving: &cluster.Serving{Task: "x", Model: "fashion", Version: version, Address: "127.0.0.1:9", Ready: true},
		}}})
	}
	first := f.place("web", nodeA, nil)
	serve(first, 1)
	placed := f.store.State().Snapshot().Alloc(nil, first)
	canary := func(id string, version uint64) {
		a := &cluster.Allocation{
			ID: id, Namespace: placed.Namespace, EvalID: id, Name: placed.Name, NodeID: nodeA, JobID: "web", TaskGroup: "web",
			DesiredStatus: cluster.AllocDesiredRun, AllocatedResources: placed.AllocatedResources, DeploymentID: "d",
			DeploymentStatus: &cluster.AllocDeploymentStatus{Canary: true},
		}
		f.must(&cluster.UpdateEvals{Evals: []*cluster.Evaluation{{ID: id, Namespace: a.Namespace, JobID: "web", Type: cluster.JobTypeService, Status: cluster.EvalStatusPending}}})
		f.plan(id, &cluster.Plan{Place: []*cluster.Allocation{a}, Deployment: &cluster.Deployment{
			ID: "d", Namespace: a.Namespace, JobID: "web", JobCreateIndex: placed.JobCreateIndex, Status: cluster.DeploymentRunning,
			TaskGroups: map[string]*cluster.DeploymentState{"web": {DesiredTotal: 2, DesiredCanaries: 1}},
		}})
		serve(id, version)
	}
	route := func() *pb.ModelRoute {
		return derive(f.store.State().Snapshot(), nil).models["fashion"].message
	}
	check := func(when string, production, newest uint64) {
		t.Helper()
		r := route()
		if want := map[string]uint64{"production": production, "old": 1}; !maps.Equal(r.Aliases, want) || r.Versions[0].Version != newest || len(r.Versions) != 2 {
			t.Errorf("%s: aliases %v, first version %d", when, r.Aliases, r.Versions[0].Version)
		}
	}
	check("without canaries", 2, 2)
	canary("same", 1)
	check("with a canary of the same model", 2, 2)
	f.must(&cluster.UpdateAllocs{Allocs: []*cluster.Allocation{{ID: "same", ClientStatus: cluster.AllocClientFailed}}})
	canary("newer", 2)
	check("with a canary of a newer model", 1, 1)
	if ends := route().Versions[1].Endpoints; len(ends) != 1 || ends[0].AllocId != "newer" {
		t.Errorf("the canary is not reached by its number: %v", ends)
	}
	yes := true
	f.must(&cluster.UpdateAllocs{Allocs: []*cluster.Allocation{{
		ID: "newer", ClientStatus: cluster.AllocClientRunning, DeploymentStatus: &cluster.AllocDeploymentStatus{Healthy: &yes},
		Serving: &cluster.Serving{Task: "x", Model: "fashion", Version: 2, Address: "127.0.0.1:9", Ready: true},
	}}})
	check("before the promotion", 1, 1)
	f.must(&cluster.PromoteDeployment{DeploymentID: "d"})
	check("after the promotion", 2, 2)
}
