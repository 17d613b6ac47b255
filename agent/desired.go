package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// gcEvery is how often the directories of ended allocations are counted.
const gcEvery = time.Minute

// desire makes the node run what the servers want: it stores it, then starts,
// changes and ends runners. An allocation that they do not name in a full list,
// or name as gone, ends and is forgotten.
func (a *Agent) desire(d *pb.Desired) error {
	jobs := make([]*cluster.Job, len(d.Jobs))
	for i, b := range d.Jobs {
		jobs[i] = new(cluster.Job)
		if err := cluster.Unmarshal(b, jobs[i]); err != nil {
			return fmt.Errorf("job record from the server: %w", err)
		}
	}
	allocs := make([]*cluster.Allocation, len(d.Allocs))
	named := map[string]bool{}
	for i, b := range d.Allocs {
		allocs[i] = new(cluster.Allocation)
		if err := cluster.Unmarshal(b, allocs[i]); err != nil {
			return fmt.Errorf("allocation record from the server: %w", err)
		}
		named[allocs[i].ID] = true
	}
	for _, id := range d.All {
		named[id] = true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	keep := make([]*cluster.Allocation, 0, len(allocs))
	for _, alloc := range allocs {
		known := a.runners[alloc.ID]
		switch {
		case known == nil && (alloc.ClientTerminal() || alloc.ServerTerminal()):
			// It is over as far as the servers know, or was ended before it came here.
			if alloc.ServerTerminal() && !alloc.ClientTerminal() {
				a.updates.put(neverRan(alloc))
			}
		case known != nil && alloc.Epoch < known.epoch():
		default:
			keep = append(keep, alloc)
		}
	}
	if err := a.store.saveDesired(jobs, keep, nil); err != nil {
		return fmt.Errorf("store what the servers want: %w", err)
	}
	var fresh []*runner
	for _, alloc := range keep {
		job, err := a.store.job(alloc.JobKey(), alloc.JobVersion)
		if err != nil {
			return err
		}
		if r := a.runners[alloc.ID]; r != nil {
			r.replace(alloc, job)
			continue
		}
		fresh = append(fresh, a.newRunner(alloc, job, nil))
	}
	gone := d.Gone
	if d.Full {
		for id := range a.runners {
			if !named[id] {
				gone = append(gone, id)
			}
		}
	}
	for _, id := range gone {
		if r := a.runners[id]; r != nil {
			a.forget(r)
		}
	}
	for _, r := range fresh { // only now it is known what they must wait for
		a.log.Info("allocation received", "alloc", r.id, "job", r.alloc.JobID, "group", r.alloc.TaskGroup)
		a.launch(r)
	}
	a.remember(d, allocs, named)
	if d.Full || len(gone) > 0 {
		return a.dropJobs(jobs)
	}
	return nil
}

// told is what the node was told of an allocation.
type told struct {
	index uint64 // its AllocModifyIndex
	job   string // version key
}

// maxKnown bounds the allocations that a hello names; a node that knows of more is
// told everything.
const maxKnown = 50_000

// knows is what a hello says that the node needs not be told again.
func (a *Agent) knows() (timeline string, known []*pb.KnownAlloc) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.timeline == "" || len(a.told) > maxKnown {
		return "", nil
	}
	for id, t := range a.told {
		known = append(known, &pb.KnownAlloc{Id: id, Index: t.index})
	}
	return a.timeline, known
}

// remember notes what the node was told, once it is stored. Caller holds mu.
func (a *Agent) remember(d *pb.Desired, allocs []*cluster.Allocation, named map[string]bool) {
	if d.Full {
		maps.DeleteFunc(a.told, func(id string, _ told) bool { return !named[id] })
	}
	for _, alloc := range allocs {
		a.told[alloc.ID] = told{alloc.AllocModifyIndex, string(versionKey(alloc.JobKey(), alloc.JobVersion))}
	}
	for _, id := range d.Gone {
		delete(a.told, id)
	}
	switch {
	case d.Full:
		a.timeline = d.Timeline
	case d.Timeline != a.timeline: // the first parts of something full
		a.timeline = ""
	}
}

// neverRan reports an allocation that the servers ended before it came here.
func neverRan(alloc *cluster.Allocation) *cluster.Allocation {
	return &cluster.Allocation{
		ID: alloc.ID, Namespace: alloc.Namespace, JobID: alloc.JobID, NodeID: alloc.NodeID, Epoch: alloc.Epoch,
		ClientStatus: cluster.AllocClientComplete, ClientDescription: "The allocation was stopped before it was started",
	}
}

// forget ends an allocation and removes every trace of it. Caller holds mu.
func (a *Agent) forget(r *runner) {
	r.mu.Lock()
	r.local.Gone = true
	err := a.store.saveLocal(r.id, r.local)
	done := r.ended
	r.mu.Unlock()
	if err != nil {
		r.log.Error("the end of an allocation could not be stored", "error", err)
	}
	r.requestStop()
	if done {
		a.wg.Go(func() { a.bury(r) })
	}
}

// dropJobs removes the stored job versions that nothing needs: no allocation here,
// none that the server has named, since it sends a version once as long as any
// needs it, and none to come after fresh, which it has just sent. Caller holds mu.
func (a *Agent) dropJobs(fresh []*cluster.Job) error {
	used := map[string]bool{}
	for _, j := range fresh {
		used[string(jobKey(j))] = true
	}
	for _, t := range a.told {
		used[t.job] = true
	}
	for _, r := range a.runners {
		r.mu.Lock()
		used[string(versionKey(r.alloc.JobKey(), r.alloc.JobVersion))] = true
		r.mu.Unlock()
	}
	return a.store.dropJobs(used)
}

func (r *runner) epoch() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.alloc.Epoch
}

// collectGarbage keeps the directories of the newest ended allocations only.
func (a *Agent) collectGarbage(ctx context.Context) {
	tick := time.NewTicker(gcEvery)
	defer tick.Stop()
	for {
		a.collectOnce()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (a *Agent) collectOnce() {
	a.mu.Lock()
	var ended []*runner
	for _, r := range a.runners {
		r.mu.Lock()
		if r.ended && !r.local.Collected && !r.local.Gone {
			ended = append(ended, r)
		}
		r.mu.Unlock()
	}
	a.mu.Unlock()
	if len(ended) <= a.cfg.KeepAllocs {
		return
	}
	slices.SortFunc(ended, func(x, y *runner) int { return cmp.Compare(y.finished(), x.finished()) })
	for _, r := range ended[a.cfg.KeepAllocs:] {
		if err := r.collect(); err != nil {
			r.log.Warn("the directory of an ended allocation could not be removed", "error", err)
			continue
		}
		r.log.Info("directory of an ended allocation removed", "kept", a.cfg.KeepAllocs)
	}
}
