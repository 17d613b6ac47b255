package scheduler

import (
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// Steps makes a leader's decisions one at a time, without goroutines, clock or
// randomness of its own: the same queue, planning, retries, deployments, drains,
// launches and collection that Run drives on a real leader. It is for simulation. A new
// reign begins with new Steps.
type Steps struct {
	queue *queue
	state <-chan struct{} // closed when its state is replaced
	keep  Retention
	newID func() string

	collector *collector
	launcher  *launcher
	cache     place.Cache
	tally     place.Tally
	plans     int
}

// mixPlans is how many times Steps plan by one mix of work.
const mixPlans = 64

// NewSteps begins a reign; zero values of keep take the defaults.
func NewSteps(keep Retention, newID func() string) *Steps {
	keep.defaults()
	s := &Steps{queue: newQueue(), keep: keep, newID: newID}
	s.collector = newCollector(&s.keep)
	s.launcher = newLauncher(func(*cluster.Job, error) {})
	return s
}

// Batch is evaluations that were planned on one snapshot.
type Batch struct {
	steps   *Steps
	items   []*item
	results []*place.Result
}

// Plan takes at most max ready evaluations, each of another job, and plans them
// on a snapshot; nil when there is nothing to write. Batches may overlap, as
// those of several workers do. Each must be settled. next is when the queue should
// be looked at again should nothing change, 0 for never.
func (s *Steps) Plan(snap *cluster.Snapshot, now cluster.Time, max int) (b *Batch, next cluster.Time) {
	if s.state != snap.Abandoned() {
		s.state = snap.Abandoned()
		s.queue.forget()
	}
	open := func(from uint64) []*cluster.Evaluation { return snap.OpenEvalsFrom(nil, from) }
	s.queue.weigh(snap, now)
	next, _ = s.queue.sync(open, snap.Index(nil, cluster.IndexCapacity), snap.SchedulerConfig(nil).PauseEvalBroker, now)
	b = &Batch{steps: s}
	if s.plans%mixPlans == 0 {
		s.cache.Expect(mixOf(snap, &s.tally))
	}
	s.plans++
	view := s.cache.View(snap)
	for len(b.items) == 0 {
		taken := s.queue.takeReady(max)
		if len(taken) == 0 {
			return nil, next
		}
		for _, i := range taken {
			eval := snap.Eval(nil, i.eval.ID)
			if eval == nil || eval.Terminal() {
				s.queue.ended(i)
				continue
			}
			r := planOne(view, snap, eval, now, s.newID, 1)
			if unchanged(eval, r) {
				s.queue.done(i, r.Eval.SnapshotIndex)
				continue
			}
			b.items, b.results = append(b.items, i), append(b.results, r)
		}
	}
	return b, next
}

// Results are the plans of the batch with what placement said of them.
func (b *Batch) Results() []*place.Result { return b.results }

// Command commits the batch.
func (b *Batch) Command() *cluster.ApplyPlans {
	cmd := &cluster.ApplyPlans{}
	for _, r := range b.results {
		cmd.Plans = append(cmd.Plans, r.Plan)
	}
	return cmd
}

// Settle takes what became of the batch and gives what must be committed because
// of it: evaluations that are given up.
func (b *Batch) Settle(res cluster.Result, err error, now cluster.Time) []cluster.Command {
	var cmds []cluster.Command
	q := b.steps.queue
	for n, i := range b.items {
		out := outcome{index: res.Index, err: err}
		if err == nil {
			out.PlanResult = res.Plans[n]
		}
		if why := q.settle(i, b.results[n], out); why != "" {
			cmds = append(cmds, failure(i.eval, why, now, b.steps.newID))
			q.again(i, 0, 0) // until that is applied
		}
	}
	return cmds
}

// Watch looks after deployments, drains and periodic jobs: what must be committed now.
func (s *Steps) Watch(snap *cluster.Snapshot, now cluster.Time) (cmds []cluster.Command) {
	for _, d := range snap.ActiveDeployments(nil) {
		if due := snap.ProgressDue(d); due != 0 && due <= now {
			cmds = append(cmds, overdue(d, s.newID))
		}
	}
	d := lookAtDrains(snap, nil, now)
	for _, n := range d.empty {
		cmds = append(cmds, &cluster.UpdateDrain{NodeID: n.ID, Complete: true})
	}
	if len(d.move) > 0 {
		cmds = append(cmds, d.command(s.newID))
	}
	launches, _ := s.launcher.look(snap, nil, now, s.newID)
	for _, l := range launches {
		cmds = append(cmds, l)
	}
	return cmds
}

// Collect gives the commands that forget what has ended.
func (s *Steps) Collect(snap *cluster.Snapshot, now cluster.Time) (cmds []cluster.Command) {
	for done := false; !done; {
		var page []cluster.Command
		page, done = s.collector.page(snap, now)
		cmds = append(cmds, page...)
	}
	return cmds
}
