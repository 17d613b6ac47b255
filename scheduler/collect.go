package scheduler

import (
	"context"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// reapBatch bounds the records that one command forgets.
const reapBatch = 2000

// collect forgets ended records from time to time.
func (s *Scheduler) collect(ctx context.Context) error {
	for {
		if err := sleep(ctx, s.keep.Interval); err != nil {
			return err
		}
		garbage := s.keep.findGarbage(s.store.State().Snapshot(), now())
		for _, cmd := range garbage.commands() {
			if _, err := s.apply(ctx, cmd); err != nil {
				if ctx.Err() == nil {
					s.log.Error("ended records could not be forgotten", "error", err)
				}
				break
			}
			s.metrics.reaped.Add(float64(len(cmd.Evals) + len(cmd.Allocs) + len(cmd.Deployments) + len(cmd.Jobs)))
		}
	}
}

// garbage is what may be forgotten.
type garbage struct {
	evals, allocs, deployments []string
	jobs                       []cluster.JobKey
}

// findGarbage looks through the state. What placement still needs to know is
// never garbage: batch work that is done, a failed allocation that holds its
// place, the latest deployment of a version.
func (r *Retention) findGarbage(snap *cluster.Snapshot, now cluster.Time) garbage {
	var g garbage
	old := func(modified int64, keep time.Duration) bool { return cluster.Time(modified).Add(keep) <= now }
	gone := map[cluster.JobKey]bool{}
	jobs := map[cluster.JobKey]*cluster.Job{}
	for _, j := range snap.Jobs(nil, "*", "") {
		jobs[j.Key()] = j
		if r.deadJob(snap, j, now) {
			g.jobs = append(g.jobs, j.Key())
			gone[j.Key()] = true
		}
	}
	needed := map[string]bool{} // evaluations whose allocations stay
	for _, a := range snap.Allocs(nil, "") {
		if gone[a.JobKey()] {
			continue // leaves with its job
		}
		if old(a.ModifyTime, r.Evaluations) && spent(a, jobs[a.JobKey()]) {
			g.allocs = append(g.allocs, a.ID)
		} else {
			needed[a.EvalID] = true
		}
	}
	for _, e := range snap.Evals(nil, "") {
		if e.Terminal() && old(e.ModifyTime, r.Evaluations) && !needed[e.ID] && !gone[e.JobKey()] {
			g.evals = append(g.evals, e.ID)
		}
	}
	for _, d := range snap.Deployments(nil, "") {
		if d.Active() || !old(d.ModifyTime, r.Deployments) || gone[d.JobKey()] {
			continue
		}
		if latest := snap.LatestDeployment(nil, d.JobKey()); jobs[d.JobKey()] == nil || latest.ID != d.ID {
			g.deployments = append(g.deployments, d.ID)
		}
	}
	return g
}

// deadJob says whether a job has ended for good and long ago.
func (r *Retention) deadJob(snap *cluster.Snapshot, j *cluster.Job, now cluster.Time) bool {
	if j.Status != cluster.JobStatusDead || (!j.Stop && j.Type != cluster.JobTypeBatch) {
		return false
	}
	last := j.SubmitTime
	for _, e := range snap.EvalsByJob(nil, j.Key()) {
		if !e.Terminal() {
			return false
		}
		last = max(last, e.ModifyTime)
	}
	for _, a := range snap.AllocsByJob(nil, j.Key()) {
		if !a.ClientTerminal() {
			return false
		}
		last = max(last, a.ModifyTime)
	}
	return cluster.Time(last).Add(r.Jobs) <= now
}

// spent says whether an allocation no longer counts for its job (nil: purged).
func spent(a *cluster.Allocation, j *cluster.Job) bool {
	switch {
	case !a.ClientTerminal():
		return false
	case j == nil || j.CreateIndex != a.JobCreateIndex:
		return true
	case j.Type == cluster.JobTypeBatch:
		return a.JobVersion < j.Version || a.NextAllocation != ""
	}
	return a.ServerTerminal() || a.NextAllocation != "" || a.ClientStatus != cluster.AllocClientFailed
}

// commands packs garbage into commands of bounded size.
func (g *garbage) commands() (cmds []*cluster.Reap) {
	var cmd *cluster.Reap
	room := 0
	next := func() *cluster.Reap {
		if room == 0 {
			cmd, room = &cluster.Reap{}, reapBatch
			cmds = append(cmds, cmd)
		}
		room--
		return cmd
	}
	for _, id := range g.allocs {
		c := next()
		c.Allocs = append(c.Allocs, id)
	}
	for _, id := range g.evals {
		c := next()
		c.Evals = append(c.Evals, id)
	}
	for _, id := range g.deployments {
		c := next()
		c.Deployments = append(c.Deployments, id)
	}
	for _, k := range g.jobs {
		c := next()
		c.Jobs = append(c.Jobs, k)
	}
	return cmds
}
