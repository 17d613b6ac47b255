package scheduler

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/scheduler/place"
)

// Explain says of a registered job what runs, what waits and why, and what its next plan does; nil when there is no
// such job. It changes nothing and works on any server; where the job stands in the queue only the leader knows, see
// Position.
func (r *DryRuns) Explain(snap *cluster.Snapshot, key cluster.JobKey, now cluster.Time) *cluster.Explanation {
	job := snap.Job(nil, key)
	if job == nil {
		return nil
	}
	eval := &cluster.Evaluation{
		ID: "explain", Namespace: job.Namespace, JobID: job.ID, Type: job.Type, Priority: job.Priority,
		TriggeredBy: cluster.TriggerJobRegister, JobModifyIndex: job.JobModifyIndex, Status: cluster.EvalStatusPending,
	}
	open := snap.OpenEvalsByJob(key)
	for _, e := range open {
		if e.Status == cluster.EvalStatusBlocked {
			eval = e
		}
	}
	x := r.explain(snap, job, eval, now)
	for _, e := range open {
		x.Evaluations = append(x.Evaluations, &cluster.OpenEvaluation{
			ID: e.ID, Status: e.Status, TriggeredBy: e.TriggeredBy, Description: e.StatusDescription, CreateTime: e.CreateTime, WaitUntil: e.WaitUntil,
		})
	}
	slices.SortStableFunc(x.Evaluations, func(a, b *cluster.OpenEvaluation) int { return cmp.Compare(a.CreateTime, b.CreateTime) })
	x.Evaluations = x.Evaluations[:min(len(x.Evaluations), cluster.MaxExplained)]
	return x
}

// WhatIf says what would become of a job if it were registered now, as Explain says it of one that is. The job is as
// for DryRun, and so is the error.
func (r *DryRuns) WhatIf(snap *cluster.Snapshot, job *cluster.Job, now cluster.Time) (*cluster.Explanation, error) {
	j, err := asRegistered(snap, job)
	if err != nil {
		return nil, err
	}
	spawns := ""
	switch {
	case j.Periodic != nil:
		spawns = "periodic"
	case j.ParameterizedJob != nil:
		spawns = "parameterized"
	}
	j.Periodic, j.ParameterizedJob = nil, nil
	x := r.explain(snap, j, dryEval(j), now)
	x.Spawns = spawns
	return x, nil
}

func (r *DryRuns) explain(snap *cluster.Snapshot, job *cluster.Job, eval *cluster.Evaluation, now cluster.Time) *cluster.Explanation {
	x := r.view(snap).Explain(place.Input{Job: job, Eval: eval, Now: now, NewID: dryIDs()})
	if old := snap.Job(nil, job.Key()); old != nil {
		x.Status = old.Status
	}
	x.Quota = snap.QuotaStanding(job.Namespace)
	for _, g := range x.Groups {
		if x.Quota != nil && g.Failure != nil && x.Quota.Exceeded == nil {
			x.Quota.Exceeded = g.Failure.QuotaExhausted
		}
	}
	return x
}

// Position says where a job stands among all that wait for this server's scheduler; nil when nothing of it waits. It
// fails with CodeNoLeader when this server does not schedule. It costs a look at all open evaluations.
func (s *Scheduler) Position(key cluster.JobKey) (*cluster.QueuePosition, error) {
	q := s.queue.Load()
	if q == nil {
		return nil, cluster.Errorf(cluster.CodeNoLeader, "this server does not schedule")
	}
	return q.position(s.store.State().Snapshot(), key), nil
}

// position compares a job's place with those of all jobs that wait. Most of them wait blocked: they were tried, and are
// tried again together, in this order, when there is room.
func (q *queue) position(snap *cluster.Snapshot, key cluster.JobKey) *cluster.QueuePosition {
	mine := snap.OpenEvalsByJob(key)
	if len(mine) == 0 {
		return nil
	}
	p := &cluster.QueuePosition{}
	shares, first := q.standing(p, mine)
	if first == nil { // it only waits for a time
		return p
	}
	p.Share = shares[key.Namespace]
	ahead := func(e *cluster.Evaluation) bool {
		order := rankOf(e).compare(rankOf(first))
		if order == 0 && e.Namespace != key.Namespace {
			order = cmp.Compare(shares[e.Namespace], shares[key.Namespace])
		}
		return cmp.Or(order, before(e, first)) < 0
	}
	best := map[cluster.JobKey]*cluster.Evaluation{} // of each job that waits what goes first
	for _, e := range snap.OpenEvals(nil) {
		if e.WaitUntil > q.clock() {
			continue
		}
		if k := e.JobKey(); best[k] == nil || before(e, best[k]) < 0 {
			best[k] = e
		}
	}
	best[key] = first
	count := func(position, of *int, e *cluster.Evaluation) {
		*of++
		if e == first || ahead(e) {
			*position++
		}
	}
	for _, e := range best {
		count(&p.Position, &p.Of, e)
		if e.Priority == first.Priority {
			count(&p.InPriority, &p.OfPriority, e)
		}
		if e.Namespace == key.Namespace {
			count(&p.InNamespace, &p.OfNamespace, e)
		}
	}
	return p
}

// standing takes from the queue what of a position only it knows, with the shares of all namespaces, and finds the
// evaluation that goes first; nil if all wait for a time.
func (q *queue) standing(p *cluster.QueuePosition, mine []*cluster.Evaluation) (shares map[string]float64, first *cluster.Evaluation) {
	q.mu.Lock()
	defer q.mu.Unlock()
	p.Paused = q.paused
	shares = make(map[string]float64, len(q.fair.tenants))
	for name, t := range q.fair.tenants {
		shares[name] = t.share
	}
	if t := q.fair.tenants[mine[0].Namespace]; t != nil {
		for _, x := range t.held {
			p.Held = max(p.Held, x)
		}
	}
	p.Blocked = true
	for _, e := range mine {
		i := q.items[e.ID]
		until := e.WaitUntil
		if i != nil {
			p.Planning = p.Planning || i.out
			p.Attempts = max(p.Attempts, i.attempts)
			until = max(until, i.until)
		}
		if until > q.now {
			if p.WaitUntil == 0 || until < p.WaitUntil {
				p.WaitUntil = until
			}
			continue
		}
		if e.Status != cluster.EvalStatusBlocked {
			p.Blocked = false
		}
		if first == nil || before(e, first) < 0 {
			first = e
		}
	}
	if first == nil {
		p.Blocked = false
	} else {
		p.WaitUntil = 0
	}
	return shares, first
}

// clock is the time of the last look at the state.
func (q *queue) clock() cluster.Time {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.now
}

// asRegistered gives a copy of a job as the state would have it if it were registered now.
func asRegistered(snap *cluster.Snapshot, job *cluster.Job) (*cluster.Job, error) {
	j := cluster.Clone(job)
	var faults []error
	for _, g := range j.TaskGroups {
		for _, t := range g.Tasks {
			if t.Model == nil {
				continue
			}
			v, err := snap.ResolveModel(t.Model)
			if err != nil {
				faults = append(faults, fmt.Errorf("group.%s.task.%s.config.model: %w", g.Name, t.Name, err))
				continue
			}
			t.Model.Version, t.Model.Digest, t.Model.Size = v.Version, v.Digest, v.Size
		}
	}
	if err := errors.Join(faults...); err != nil {
		return nil, err
	}
	next := snap.Index(nil) + 1
	j.Version, j.CreateIndex, j.JobModifyIndex = 0, next, next
	if old := snap.Job(nil, j.Key()); old != nil {
		j.CreateIndex = old.CreateIndex
		if cluster.SpecEqual(j, old) {
			j.Version, j.JobModifyIndex = old.Version, old.JobModifyIndex
		} else {
			j.Version = old.Version + 1
		}
	}
	return j, nil
}

// dryEval is the evaluation that registering a job would make.
func dryEval(j *cluster.Job) *cluster.Evaluation {
	return &cluster.Evaluation{
		ID: "dry-run", Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Priority: j.Priority,
		TriggeredBy: cluster.TriggerJobRegister, JobModifyIndex: j.JobModifyIndex, Status: cluster.EvalStatusPending,
	}
}

func dryIDs() func() string {
	ids := 0
	return func() string { ids++; return fmt.Sprintf("dry-run-%d", ids) }
}

// view prepares a snapshot, with the mix of work that it is asked for.
func (r *DryRuns) view(snap *cluster.Snapshot) *place.View {
	var cache place.Cache
	r.mu.Lock()
	mix := mixOf(snap, &r.tally)
	r.mu.Unlock()
	cache.Expect(mix)
	return cache.View(snap)
}
