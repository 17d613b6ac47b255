package sim

import (
	"fmt"

	"github.com/rxvision/rxvision/cluster"
)

// forms are the jobs with children: one is parameterized, one periodic, one both.
const forms = 3

// form registers such a job, or stops one: of them or of those dispatched from them.
func (u *user) form(snap *cluster.Snapshot) cluster.Command {
	w := u.w
	if j := someJob(u, snap); j != nil && j.Spawns() {
		return &cluster.DeregisterJob{Namespace: j.Namespace, JobID: j.ID, Purge: w.chance(300), EvalID: w.newID()}
	}
	n := w.rnd.IntN(forms)
	j := u.job(fmt.Sprintf("form-%d", n), snap)
	if !j.PerNode() {
		j.Type = cluster.JobTypeBatch
	} else {
		j.Type = cluster.JobTypeSysBatch
	}
	for _, g := range j.TaskGroups {
		g.Update, g.Migrate, g.Disconnect = nil, nil, nil
	}
	if n != 1 {
		j.ParameterizedJob = &cluster.ParameterizedJobConfig{Payload: cluster.PayloadOptional, MetaOptional: []string{"key"}}
	}
	if n != 0 {
		j.Periodic = &cluster.PeriodicConfig{
			Enabled: w.chance(900), SpecType: cluster.PeriodicSpecCron, Specs: []string{"* * * * *"}, TimeZone: "UTC", ProhibitOverlap: w.chance(500),
		}
	}
	return &cluster.RegisterJob{Job: j, EvalID: w.newID()}
}

func (u *user) formID() string { return fmt.Sprintf("form-%d", u.w.rnd.IntN(forms)) }

// dispatch runs a parameterized job, with one of a few tokens half of the time.
func (u *user) dispatch(*cluster.Snapshot) cluster.Command {
	w := u.w
	cmd := &cluster.DispatchJob{Namespace: cluster.DefaultNamespace, JobID: u.formID(), EvalID: w.newID(), Payload: []byte("payload")}
	if w.chance(500) {
		cmd.IdempotencyToken = fmt.Sprintf("token-%d", w.rnd.IntN(20))
	}
	if w.chance(500) {
		cmd.Meta = map[string]string{"key": fmt.Sprint(w.rnd.IntN(9))}
	}
	return cmd
}

// launch runs a periodic job by hand.
func (u *user) launch(snap *cluster.Snapshot) cluster.Command {
	k := cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: u.formID()}
	if jobs := snap.LaunchingJobs(nil); len(jobs) > 0 {
		k = pick(u.w, jobs).Key()
	}
	return &cluster.LaunchJob{Namespace: k.Namespace, JobID: k.ID, EvalID: u.w.newID()}
}
