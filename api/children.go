package api

import (
	"cmp"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/cron"
)

// dispatched is the answer to a dispatch: the child, and its evaluation unless it is periodic
// itself or had been dispatched before.
type dispatched struct {
	DispatchedJobID string
	EvalID          string
	EvalCreateIndex uint64
	JobCreateIndex  uint64
	Index           uint64
}

// dispatchJob creates a child of a parameterized job. All is checked where it is applied,
// not on a state that may be older.
func (s *Server) dispatchJob(r *request) (any, error) {
	var req api.JobDispatchRequest
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if err := bodyJob(r, cmp.Or(req.JobID, r.params["job"])); err != nil {
		return nil, err
	}
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.DispatchJob{
		Namespace: r.namespace, JobID: r.params["job"], Payload: req.Payload, Meta: req.Meta, Priority: req.Priority,
		IDPrefix: req.IdPrefixTemplate, IdempotencyToken: r.query.Get("idempotency_token"), EvalID: newID(),
	})
	if err != nil {
		return nil, refused(err)
	}
	reply := &dispatched{DispatchedJobID: res.JobID, EvalID: res.EvalID, Index: res.Index}
	if res.EvalID != "" {
		reply.EvalCreateIndex = res.Index
	}
	if child := s.cfg.Store.State().Snapshot().Job(nil, cluster.JobKey{Namespace: r.namespace, ID: res.JobID}); child != nil {
		reply.JobCreateIndex = child.CreateIndex
	}
	return &answer{body: reply, index: res.Index}, nil
}

// forceLaunch creates a child of a periodic job now, whatever its times and what runs.
func (s *Server) forceLaunch(r *request) (any, error) {
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.LaunchJob{Namespace: r.namespace, JobID: r.params["job"], EvalID: newID()})
	if err != nil {
		return nil, refused(err)
	}
	return &answer{body: &struct {
		EvalID                 string
		EvalCreateIndex, Index uint64
	}{res.EvalID, res.Index, res.Index}, index: res.Index}, nil
}

// nextLaunch is when a job would be launched next, in its own time zone; nil: never.
func nextLaunch(j *cluster.Job) *time.Time {
	if !j.Launches() {
		return nil
	}
	times, err := cron.Parse(j.Periodic.TimeZone, j.Periodic.Crons()...)
	if err != nil {
		return nil // it was checked
	}
	if next := times.Next(time.Now()); !next.IsZero() {
		return &next
	}
	return nil
}
