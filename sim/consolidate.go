package sim

import (
	"fmt"
	"slices"
	"strings"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// mover is the scheduler's placement in a cluster where Burstable and BE pods may be moved: what a plan stops has ended
// at once, and is placed again where its claim says.
type mover struct {
	engine
	cache place.Cache
	held  map[string]*nodeHeld // by node
	live  map[cluster.JobKey]*movedJob
	moves int
	err   error
}

// nodeHeld is what a node holds, by ID. It is replaced, never changed: its address is the version.
type nodeHeld struct{ allocs []*cluster.Allocation }

// find says where an allocation stands, or would.
func (h *nodeHeld) find(id string) (at int, there bool) {
	return slices.BinarySearchFunc(h.allocs, id, func(a *cluster.Allocation, id string) int { return strings.Compare(a.ID, id) })
}

type movedJob struct {
	job    *cluster.Job
	allocs []*cluster.Allocation
	open   []*cluster.Evaluation
}

func newMover(t *Trace) *mover {
	m := &mover{engine: engine{trace: t, nodes: t.records(), jobs: map[*TracePod]*cluster.Job{}}, held: map[string]*nodeHeld{}, live: map[cluster.JobKey]*movedJob{}}
	m.config.PreemptionConfig.BatchSchedulerEnabled = true
	m.cache.Expect(m.mix())
	return m
}

func (m *mover) newID() string { m.n++; return fmt.Sprintf("%08d", m.n) }

func (m *mover) place(p *TracePod) bool {
	j := *m.job(p)
	j.ID, j.CreateIndex = fmt.Sprintf("%s-%d", j.ID, m.n), 1
	if classOf(p.QoS) > 0 {
		g := *j.TaskGroups[0]
		g.Preempt = &cluster.PreemptPolicy{Reclaim: true, Move: true}
		j.TaskGroups = []*cluster.TaskGroup{&g}
	}
	x := &movedJob{job: &j}
	m.live[j.Key()] = x
	plan := m.plan(x, m.cache.View(m), &cluster.Evaluation{ID: m.newID(), Namespace: j.Namespace, JobID: j.ID, Type: j.Type, TriggeredBy: cluster.TriggerJobRegister, Status: cluster.EvalStatusPending})
	if len(plan.Stop) == 0 {
		if len(plan.Place) == 0 {
			delete(m.live, j.Key())
		}
		return len(plan.Place) == 1
	}
	var again []*movedJob
	for _, s := range plan.Stop {
		again = append(again, m.stop(s.AllocID))
	}
	again = append(again, x)
	for _, e := range plan.Evals {
		if len(e.Claims) > 0 {
			m.live[e.JobKey()].open = []*cluster.Evaluation{e}
		}
	}
	for _, x := range again {
		e := x.open[0]
		if placed := m.plan(x, m.cache.View(m), e).Place; len(placed) != 1 || placed[0].NodeID != e.Claims[0].NodeID {
			m.err = fmt.Errorf("%s, which was to go to node %s, was not placed there", x.job.ID, e.Claims[0].NodeID)
			return false
		}
		x.open = nil
	}
	m.moves += len(plan.Stop)
	return true
}

// plan plans, and does what it places.
func (m *mover) plan(x *movedJob, v *place.View, e *cluster.Evaluation) *cluster.Plan {
	plan := v.Plan(place.Input{Job: x.job, Eval: e, Now: 1, NewID: m.newID}).Plan
	for _, a := range plan.Place {
		x.allocs = []*cluster.Allocation{a}
		a.JobCreateIndex, a.ClientStatus = x.job.CreateIndex, cluster.AllocClientRunning
		was := m.held[a.NodeID]
		if was == nil {
			was = &nodeHeld{}
		}
		at, _ := was.find(a.ID)
		m.held[a.NodeID] = &nodeHeld{slices.Insert(slices.Clone(was.allocs), at, a)}
	}
	return plan
}

// stop ends an allocation.
func (m *mover) stop(id string) *movedJob {
	for node, h := range m.held {
		at, found := h.find(id)
		if !found {
			continue
		}
		a := *h.allocs[at]
		m.held[node] = &nodeHeld{slices.Delete(slices.Clone(h.allocs), at, at+1)}
		a.DesiredStatus, a.ClientStatus = cluster.AllocDesiredEvict, cluster.AllocClientComplete
		x := m.live[a.JobKey()]
		x.allocs = []*cluster.Allocation{&a}
		return x
	}
	panic("sim: a plan stops " + id + ", which does not run")
}

func (m *mover) HoldingVersions(fn func(nodeID string, version any)) {
	for _, n := range m.nodes {
		if h := m.held[n.ID]; h != nil && len(h.allocs) > 0 {
			fn(n.ID, h)
		}
	}
}

func (m *mover) AllocsHolding(_ cluster.WatchSet, nodeID string) []*cluster.Allocation {
	if h := m.held[nodeID]; h != nil {
		return h.allocs
	}
	return nil
}

func (m *mover) AllocsByJob(_ cluster.WatchSet, key cluster.JobKey) []*cluster.Allocation {
	if x := m.live[key]; x != nil {
		return x.allocs
	}
	return nil
}

func (m *mover) Job(_ cluster.WatchSet, key cluster.JobKey) *cluster.Job {
	if x := m.live[key]; x != nil {
		return x.job
	}
	return nil
}

func (m *mover) JobVersion(ws cluster.WatchSet, key cluster.JobKey, _ uint64) *cluster.Job {
	return m.Job(ws, key)
}

func (m *mover) OpenEvalsByJob(key cluster.JobKey) []*cluster.Evaluation {
	if x := m.live[key]; x != nil {
		return x.open
	}
	return nil
}
