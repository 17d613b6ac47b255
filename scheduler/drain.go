package scheduler

import (
	"context"
	"slices"

	"github.com/rxvision/rxvision/cluster"
)

// maxTransitions bounds the allocations that one command asks to move.
const maxTransitions = 1000

// watchDrains empties draining nodes: it asks as many allocations of each group
// to move as its migrate block allows, all that is left at the drain's deadline,
// and ends the drain of a node where nothing runs any more.
func (s *Scheduler) watchDrains(ctx context.Context) error {
	return s.watchState(ctx, 0, func(snap *cluster.Snapshot, ws cluster.WatchSet) (next cluster.Time) {
		d := lookAtDrains(snap, ws, now())
		for _, n := range d.empty {
			s.endDrain(ctx, n)
		}
		s.moveAllocs(ctx, d)
		return d.next
	})
}

// groupKey names a group of a job.
type groupKey struct {
	cluster.JobKey
	group string
}

// drain is one look at all draining nodes.
type drain struct {
	snap   *cluster.Snapshot
	ws     cluster.WatchSet
	now    cluster.Time
	next   cluster.Time     // the nearest deadline
	budget map[groupKey]int // how many more of a group may move now
	move   map[string]cluster.DesiredTransition
	jobs   []*cluster.Job // of the allocations in move
	empty  []*cluster.Node
}

func lookAtDrains(snap *cluster.Snapshot, ws cluster.WatchSet, now cluster.Time) *drain {
	d := &drain{snap: snap, ws: ws, now: now, budget: map[groupKey]int{}, move: map[string]cluster.DesiredTransition{}}
	for _, n := range snap.Nodes(ws, "") {
		if n.Drain && n.DrainStrategy != nil && d.node(n) {
			d.empty = append(d.empty, n)
		}
	}
	return d
}

// node chooses what moves off a node; true when the node is empty. System jobs leave when
// all else has, or never, if the drain ignores them: then the node is empty with them.
func (d *drain) node(n *cluster.Node) (empty bool) {
	s := n.DrainStrategy
	force := s.Deadline < 0 || (s.ForceDeadline != 0 && s.ForceDeadline <= d.now)
	if !force {
		d.next = earliest(d.next, s.ForceDeadline)
	}
	var system []*cluster.Allocation
	others := 0
	for _, a := range d.snap.AllocsHolding(d.ws, n.ID) {
		j := d.snap.Job(d.ws, a.JobKey())
		if j != nil && j.Type == cluster.JobTypeSystem {
			if !s.IgnoreSystemJobs {
				system = append(system, a)
			}
			continue
		}
		others++
		if j == nil {
			continue // a purged job's work is being stopped
		}
		leaves := force
		switch {
		case force:
		case j.Finite():
			leaves = s.Interrupted // it may end by itself, unless the node is sure to go
		default:
			leaves = stays(a) && d.spend(j, a)
		}
		if !leaves {
			continue
		}
		d.ask(j, a)
	}
	if force || others == 0 {
		for _, a := range system {
			d.ask(d.snap.Job(d.ws, a.JobKey()), a)
		}
	}
	return others+len(system) == 0
}

// stays says whether nobody has asked the allocation to go yet.
func stays(a *cluster.Allocation) bool { return !a.ServerTerminal() && !moving(a) }

// ask asks an allocation to move, unless it goes already.
func (d *drain) ask(j *cluster.Job, a *cluster.Allocation) {
	if !stays(a) || len(d.move) >= maxTransitions {
		return
	}
	d.move[a.ID] = cluster.DesiredTransition{Migrate: ptr(true)}
	if !slices.Contains(d.jobs, j) {
		d.jobs = append(d.jobs, j)
	}
}

func ptr[T any](v T) *T { return &v }

func moving(a *cluster.Allocation) bool {
	return a.DesiredTransition.Migrate != nil && *a.DesiredTransition.Migrate
}

// spend takes one move from the allocation's group, if it may have one more: of
// its count, all but migrate.max_parallel must stay up.
func (d *drain) spend(j *cluster.Job, a *cluster.Allocation) bool {
	g := j.Group(a.TaskGroup)
	switch {
	case g == nil:
		return false // the group is going anyway
	case !serving(a):
		return true // nobody misses it
	}
	k := groupKey{j.Key(), g.Name}
	left, known := d.budget[k]
	if !known {
		parallel := 1
		if g.Migrate != nil && g.Migrate.MaxParallel > 0 {
			parallel = g.Migrate.MaxParallel
		}
		up := 0
		for _, other := range d.snap.AllocsByJob(d.ws, j.Key()) {
			if other.TaskGroup == g.Name && serving(other) {
				up++
			}
		}
		left = up - (g.Count - parallel)
	}
	d.budget[k] = left - 1
	return left > 0
}

// serving says whether an allocation counts as up: it runs, stays, and is
// healthy if somebody watches its health.
func serving(a *cluster.Allocation) bool {
	if a.ServerTerminal() || a.ClientStatus != cluster.AllocClientRunning || moving(a) {
		return false
	}
	if s := a.DeploymentStatus; s != nil && s.Healthy != nil {
		return *s.Healthy
	}
	return a.DeploymentID == ""
}

// moveAllocs asks the chosen allocations to move, with an evaluation of each job.
func (s *Scheduler) moveAllocs(ctx context.Context, d *drain) {
	if len(d.move) == 0 {
		return
	}
	if res, err := s.apply(ctx, d.command(newID)); err == nil {
		s.log.Info("allocations are moved off draining nodes", "count", len(d.move), "index", res.Index)
	} else if ctx.Err() == nil {
		s.log.Error("allocations could not be asked to move", "count", len(d.move), "error", err)
		d.next = earliest(d.next, now().Add(retryLater))
	}
}

func (d *drain) command(newID func() string) *cluster.UpdateTransitions {
	cmd := &cluster.UpdateTransitions{Transitions: d.move}
	for _, j := range d.jobs {
		cmd.Evals = append(cmd.Evals, &cluster.Evaluation{
			ID: newID(), Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Priority: j.Priority,
			JobModifyIndex: j.JobModifyIndex, TriggeredBy: cluster.TriggerNodeDrain, Status: cluster.EvalStatusPending,
		})
	}
	return cmd
}

func (s *Scheduler) endDrain(ctx context.Context, n *cluster.Node) {
	res, err := s.apply(ctx, &cluster.UpdateDrain{NodeID: n.ID, Complete: true})
	if err == nil {
		s.log.Info("node drain complete", "node", n.ID, "index", res.Index)
	} else if ctx.Err() == nil && cluster.CodeOf(err) != cluster.CodeNotFound {
		s.log.Error("a drain could not be ended", "node", n.ID, "error", err)
	}
}
