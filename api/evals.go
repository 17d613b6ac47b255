package api

import (
	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

// evaluation is an evaluation as clients read it.
type evaluation struct {
	*cluster.Evaluation
	FailedTGAllocs map[string]*allocMetric
	RelatedEvals   []*evalStub `json:",omitempty"`
}

// evalStub is an evaluation that another one led to.
type evalStub struct {
	ID, Type, TriggeredBy, Namespace, JobID, NodeID, DeploymentID  string
	Status, StatusDescription, NextEval, PreviousEval, BlockedEval string
	Priority                                                       int
	WaitUntil                                                      cluster.Time
	CreateIndex, ModifyIndex                                       uint64
	CreateTime, ModifyTime                                         int64
}

func showEval(e *cluster.Evaluation) *evaluation {
	return &evaluation{Evaluation: e, FailedTGAllocs: metricsOf(e.FailedTGAllocs)}
}

func stubOfEval(e *cluster.Evaluation) *evalStub {
	return &evalStub{
		ID: e.ID, Type: e.Type, TriggeredBy: e.TriggeredBy, Namespace: e.Namespace, JobID: e.JobID, NodeID: e.NodeID,
		DeploymentID: e.DeploymentID, Status: e.Status, StatusDescription: e.StatusDescription, NextEval: e.NextEval,
		PreviousEval: e.PreviousEval, BlockedEval: e.BlockedEval, Priority: e.Priority, WaitUntil: e.WaitUntil,
		CreateIndex: e.CreateIndex, ModifyIndex: e.ModifyIndex, CreateTime: e.CreateTime, ModifyTime: e.ModifyTime,
	}
}

// allocMetric is the story of a placement as clients read it: scores as fractions.
type allocMetric struct {
	*cluster.AllocMetric
	ScoreMetaData []nodeScore
}

type nodeScore struct {
	NodeID    string
	Scores    map[string]float64
	NormScore float64
}

// thousandths is the scale of cluster.NodeScore.
const thousandths = 1000

func showMetric(m *cluster.AllocMetric) *allocMetric {
	if m == nil {
		return &allocMetric{AllocMetric: &cluster.AllocMetric{}}
	}
	out := &allocMetric{AllocMetric: m}
	for _, s := range m.ScoreMetaData {
		n := nodeScore{NodeID: s.NodeID, Scores: map[string]float64{}, NormScore: float64(s.Norm) / thousandths}
		for name, v := range s.Scores {
			n.Scores[name] = float64(v) / thousandths
		}
		out.ScoreMetaData = append(out.ScoreMetaData, n)
	}
	return out
}

func metricsOf(failed map[string]*cluster.AllocMetric) map[string]*allocMetric {
	if failed == nil {
		return nil
	}
	out := make(map[string]*allocMetric, len(failed))
	for group, m := range failed {
		out[group] = showMetric(m)
	}
	return out
}

// related finds the evaluations that led to e and that e led to.
func related(snap *cluster.Snapshot, ws cluster.WatchSet, e *cluster.Evaluation) []*evalStub {
	all := snap.EvalsByJob(ws, e.JobKey())
	seen := map[string]bool{e.ID: true}
	for grown := true; grown; {
		grown = false
		for _, o := range all {
			linked := seen[o.PreviousEval] || seen[o.NextEval] || seen[o.BlockedEval]
			if !seen[o.ID] && (linked || ledTo(all, seen, o.ID)) {
				seen[o.ID], grown = true, true
			}
		}
	}
	var out []*evalStub
	for _, o := range all {
		if seen[o.ID] && o.ID != e.ID {
			out = append(out, stubOfEval(o))
		}
	}
	return out
}

// ledTo says whether one of the seen evaluations names id.
func ledTo(all []*cluster.Evaluation, seen map[string]bool, id string) bool {
	for _, o := range all {
		if seen[o.ID] && (o.NextEval == id || o.PreviousEval == id || o.BlockedEval == id) {
			return true
		}
	}
	return false
}

func evalPage(r *request, snap *cluster.Snapshot, ws cluster.WatchSet, evals []*cluster.Evaluation) found {
	at := func(e *cluster.Evaluation) position { return created(e.CreateIndex, e.ID) }
	datum := func(e *cluster.Evaluation) any { return e }
	show := func(e *cluster.Evaluation) any { return showEval(e) }
	evals = seen(r, acl.ReadJob, evals, evalNamespace)
	return page(r, snap.Index(ws, cluster.TableEvals), evals, false, at, datum, show)
}

func evalNamespace(e *cluster.Evaluation) string { return e.Namespace }

func (s *Server) listEvals(r *request) (any, error) {
	prefix, err := r.idPrefix("eval")
	if err != nil {
		return nil, err
	}
	status, job := r.query.Get("status"), r.query.Get("job")
	if r.filter != "" && (status != "" || job != "") {
		return nil, badRequest("Filter expression cannot be used with other filter parameters")
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		evals := inNamespace(r, snap.Evals(ws, prefix), evalNamespace)
		if status != "" || job != "" {
			evals = only(evals, func(e *cluster.Evaluation) bool {
				return (status == "" || e.Status == status) && (job == "" || e.JobID == job)
			})
		}
		return evalPage(r, snap, ws, evals)
	})
}

func (s *Server) countEvals(r *request) (any, error) {
	keep, err := r.filtered()
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		index := snap.Index(ws, cluster.TableEvals)
		evals := seen(r, acl.ReadJob, inNamespace(r, snap.Evals(ws, ""), evalNamespace), evalNamespace)
		count := len(evals)
		if keep != nil {
			count = 0
			for _, e := range evals {
				ok, err := keep(e)
				if err != nil {
					return found{index: index, err: err}
				}
				if ok {
					count++
				}
			}
		}
		return found{body: struct{ Count int }{count}, index: index}
	})
}

func (s *Server) readEval(r *request) (any, error) {
	id, err := wholeUUID(r.params["id"], "eval")
	if err != nil {
		return nil, errOf("eval", err)
	}
	withRelated, err := r.flag("related", true)
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		e := snap.Eval(ws, id)
		if e == nil {
			return missing(snap, ws, cluster.TableEvals, "eval not found")
		}
		if err := r.allow(e.Namespace, ""); err != nil {
			return found{index: e.ModifyIndex, err: err}
		}
		out := showEval(e)
		if withRelated {
			out.RelatedEvals = related(snap, ws, e)
		}
		return found{body: out, index: e.ModifyIndex}
	})
}

func (s *Server) evalAllocs(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		return allocPage(r, snap, ws, snap.AllocsByEval(ws, r.params["id"]), allocFields{states: true})
	})
}
