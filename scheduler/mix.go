package scheduler

import (
	"context"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// mixEvery is how often it is looked at what work the cluster is asked for; more seldom where a look takes more than
// mixShare of that: with 100,000 jobs it takes 200 ms.
const (
	mixEvery = 10 * time.Second
	mixShare = 200
)

// watchMix keeps the mix that GPUs are kept usable for: what the jobs ask for that have
// not ended. It is replaced only by one that differs, since all nodes are judged anew then.
func (s *Scheduler) watchMix(ctx context.Context) error {
	s.mix.Store(nil)
	var tally place.Tally
	for {
		began := time.Now()
		snap := s.store.State().Snapshot()
		ws := make(cluster.WatchSet)
		snap.Index(ws, cluster.TableJobs)
		if m := mixOf(snap, &tally); !m.Like(s.mix.Load()) {
			s.mix.Store(m)
		}
		took := time.Since(began)
		ws.Add(snap.Abandoned())
		if err := waitChange(ctx, ws, 0); err != nil {
			return err
		}
		if err := sleep(ctx, max(mixEvery, mixShare*took)); err != nil {
			return err
		}
	}
}

// mixOf counts the work with devices; nil when there is none. What runs on every node has no
// choice of nodes to keep open.
func mixOf(snap *cluster.Snapshot, tally *place.Tally) *place.Mix {
	var work []place.Work
	for _, j := range snap.Jobs(nil, "*", "") {
		if j.Stop || j.Spawns() || j.PerNode() || j.Status == cluster.JobStatusDead {
			continue
		}
		for _, g := range j.TaskGroups {
			if g.Count > 0 && asksDevices(g) {
				work = append(work, place.Work{Job: j, Group: g, Allocs: int64(g.Count)})
			}
		}
	}
	if len(work) == 0 {
		return nil
	}
	return tally.Mix(work)
}

func asksDevices(g *cluster.TaskGroup) bool {
	for _, t := range g.Tasks {
		if t.Resources != nil && len(t.Resources.Devices) > 0 {
			return true
		}
	}
	return false
}
