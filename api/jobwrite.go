package api

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/jobspec"
)

// newID makes a random UUID.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hyphenate(hex.EncodeToString(b[:]))
}

// registered is the answer to writes of jobs.
type registered struct {
	EvalID          string
	EvalCreateIndex uint64
	JobModifyIndex  uint64
	Warnings        string
	Index           uint64
}

// wrote answers a write that made an evaluation.
func wrote(res cluster.Result, warnings string) *answer {
	reply := &registered{EvalID: res.EvalID, JobModifyIndex: res.JobModifyIndex, Warnings: warnings, Index: res.Index}
	if res.EvalID != "" {
		reply.EvalCreateIndex = res.Index
	}
	return &answer{body: reply, index: res.Index}
}

// checkJob turns a submitted job into the state's, or names all that is wrong with
// it in one list: what the job spec's rules find and models that are not there.
func (s *Server) checkJob(r *request, in *api.Job, sub *api.JobSubmission) (*cluster.Job, string, error) {
	s.defaultPool(in)
	j, warnings, err := jobspec.FromAPI(in, jobspec.Options{Drivers: s.cfg.Drivers, Region: s.cfg.Region})
	var faults jobspec.Faults
	if err != nil && !errors.As(err, &faults) {
		return nil, "", refused(err)
	}
	if j != nil && j.NeedsRules() > s.cfg.Store.State().Snapshot().Rules() {
		faults = append(faults, jobspec.Fault{
			Path: "job", Text: "it asks for what older servers do not know: upgrade those of the region that run an older rxvision, or, right after a start, try again",
		})
	}
	unknown := unknownModels(s.cfg.Store.State().Snapshot(), in)
	if len(unknown) > 0 { // they may be younger than what this server has applied
		if err := s.fresh(r); err != nil {
			return nil, "", err
		}
		unknown = unknownModels(s.cfg.Store.State().Snapshot(), in)
	}
	if faults = append(faults, unknown...); len(faults) > 0 {
		err = faults
		if sub != nil {
			err = jobspec.Annotate(faults, sub.Source, sub.Format)
		}
		return nil, "", refused(err)
	}
	return j, warningText(warnings), nil
}

// defaultPool gives a job that names no node pool the one of its namespace.
func (s *Server) defaultPool(in *api.Job) {
	if in.NodePool != nil && *in.NodePool != "" {
		return
	}
	name := cluster.DefaultNamespace
	if in.Namespace != nil && *in.Namespace != "" {
		name = *in.Namespace
	}
	n := s.cfg.Store.State().Snapshot().Namespace(nil, name)
	if n != nil && n.NodePoolConfiguration != nil && n.NodePoolConfiguration.Default != "" {
		in.NodePool = &n.NodePoolConfiguration.Default
	}
}

// unknownModels finds the models that a job's onnx tasks name and that are not
// registered. It reads the job as submitted, since one with other faults has no
// other form.
func unknownModels(snap *cluster.Snapshot, in *api.Job) (faults jobspec.Faults) {
	for _, g := range in.TaskGroups {
		if g == nil || g.Name == nil {
			continue
		}
		for _, t := range g.Tasks {
			if t == nil || t.Driver != jobspec.DriverONNX {
				continue
			}
			name, _ := t.Config["model"].(string)
			ref, err := jobspec.ParseModelRef(name)
			if err != nil {
				continue // the job spec's rules say so
			}
			if _, err := snap.ResolveModel(ref); err != nil {
				faults = append(faults, jobspec.Fault{
					Path: fmt.Sprintf("group.%s.task.%s.config.model", *g.Name, t.Name), Text: err.Error(),
				})
			}
		}
	}
	return faults
}

// warningText joins warnings in the form that Nomad's users know.
func warningText(warnings []string) string {
	if len(warnings) == 0 {
		return ""
	}
	noun := "warnings"
	if len(warnings) == 1 {
		noun = "warning"
	}
	return fmt.Sprintf("%d %s:\n\n* %s", len(warnings), noun, strings.Join(warnings, "\n* "))
}

func submission(sub *api.JobSubmission) *cluster.JobSubmission {
	if sub == nil {
		return nil
	}
	return &cluster.JobSubmission{Source: sub.Source, Format: sub.Format, VariableFlags: sub.VariableFlags, Variables: sub.Variables}
}

// sameJob checks a job's body against the route and the namespace parameter, and
// that the caller may do this in its namespace; a job without one belongs to the
// parameter's.
func sameJob(r *request, j *api.Job) error {
	if j == nil {
		return badRequest("Job must be specified")
	}
	if j.ID == nil || *j.ID == "" {
		return badRequest("Job ID must be specified")
	}
	if id, ok := r.params["job"]; ok && id != *j.ID {
		return badRequest("Job ID does not match")
	}
	if r.query.Get("namespace") != "" && j.Namespace == nil {
		j.Namespace = &r.namespace
	}
	namespace := cluster.DefaultNamespace
	if j.Namespace != nil && *j.Namespace != "" {
		namespace = *j.Namespace
	}
	return r.allowIn(namespace)
}

func evalPriority(p int) error {
	if p < 0 || p > 100 {
		return badRequest("eval priority must be between 1 and 100 inclusive, or 0 for the job's")
	}
	return nil
}

func (s *Server) registerJob(r *request) (any, error) {
	var req api.JobRegisterRequest
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if err := errors.Join(sameJob(r, req.Job), evalPriority(req.EvalPriority)); err != nil {
		return nil, err
	}
	if req.PreserveResources {
		return nil, notBuilt("this version of rxvision does not support preserving resources: register the job with those that it shall have")
	}
	j, warnings, err := s.checkJob(r, req.Job, req.Submission)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(r.allowIn(j.Namespace), r.mayServe(j)); err != nil {
		return nil, err
	}
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.RegisterJob{
		Job: j, Submission: submission(req.Submission), EnforceIndex: req.EnforceIndex, JobModifyIndex: req.JobModifyIndex,
		PreserveCounts: req.PreserveCounts, EvalID: newID(), EvalPriority: req.EvalPriority,
	})
	if err != nil {
		return nil, refused(err)
	}
	return wrote(res, warnings), nil
}

func (s *Server) deregisterJob(r *request) (any, error) {
	purge, err := r.flag("purge", true)
	if err != nil {
		return nil, err
	}
	noDelay, err := r.flag("no_shutdown_delay", true)
	if err != nil {
		return nil, err
	}
	priority, err := r.number("eval_priority", 0)
	if err != nil {
		return nil, err
	}
	if err := evalPriority(int(priority)); err != nil {
		return nil, err
	}
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.DeregisterJob{
		Namespace: r.namespace, JobID: r.params["job"], Purge: purge, NoShutdownDelay: noDelay,
		EvalID: newID(), EvalPriority: int(priority),
	})
	if err != nil {
		return nil, refused(err)
	}
	return wrote(res, ""), nil
}

// planReply is what `nomad job plan` prints.
type planReply struct {
	Annotations        *cluster.PlanAnnotations
	FailedTGAllocs     map[string]*allocMetric
	JobModifyIndex     uint64
	CreatedEvals       []*evaluation
	Diff               *api.JobDiff
	NextPeriodicLaunch *time.Time
	Warnings           string
	Index              uint64
}

// jobToPlan reads a job that is not to be registered, whole and checked, once this server's state is as new as asked for.
func (s *Server) jobToPlan(r *request, req *api.JobPlanRequest) (*cluster.Job, string, error) {
	if err := r.decode(req); err != nil {
		return nil, "", err
	}
	if err := sameJob(r, req.Job); err != nil {
		return nil, "", err
	}
	if err := s.fresh(r); err != nil {
		return nil, "", err
	}
	j, warnings, err := s.checkJob(r, req.Job, nil)
	if err != nil {
		return nil, "", err
	}
	return j, warnings, errors.Join(r.allowIn(j.Namespace), r.mayServe(j))
}

func (s *Server) planJob(r *request) (any, error) {
	if s.cfg.Planner == nil {
		return nil, notBuilt("this server cannot plan jobs: it runs without a scheduler")
	}
	var req api.JobPlanRequest
	j, warnings, err := s.jobToPlan(r, &req)
	if err != nil {
		return nil, err
	}
	snap := s.cfg.Store.State().Snapshot()
	old := snap.Job(nil, j.Key())
	pin(snap, j)
	dry, err := s.cfg.Planner.DryRun(r.Context(), snap, j)
	if err != nil {
		return nil, refused(err)
	}
	reply := &planReply{Annotations: dry.Annotations, FailedTGAllocs: metricsOf(dry.Failed), CreatedEvals: []*evaluation{}, Warnings: warnings, NextPeriodicLaunch: nextLaunch(j)}
	if reply.Annotations == nil {
		reply.Annotations = &cluster.PlanAnnotations{DesiredTGUpdates: map[string]*cluster.DesiredUpdates{}}
	}
	for _, e := range dry.Evals {
		reply.CreatedEvals = append(reply.CreatedEvals, showEval(e))
	}
	if old != nil {
		reply.JobModifyIndex = old.JobModifyIndex
	}
	reply.Diff = &api.JobDiff{Type: "None", ID: j.ID} // the command line needs one even when it shows none
	if req.Diff {
		reply.Diff = jobspec.Diff(old, j, true, reply.Annotations)
	}
	reply.Index = reply.JobModifyIndex
	return &answer{body: reply, index: reply.Index}, nil
}

// pin gives the models of a job the versions that registering it would pin; they
// are known to be there.
func pin(snap *cluster.Snapshot, j *cluster.Job) {
	for _, g := range j.TaskGroups {
		for _, t := range g.Tasks {
			if t.Model == nil {
				continue
			}
			if v, err := snap.ResolveModel(t.Model); err == nil {
				t.Model.Version, t.Model.Digest, t.Model.Size = v.Version, v.Digest, v.Size
			}
		}
	}
}

func (s *Server) validateJob(r *request) (any, error) {
	var req api.JobValidateRequest
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if err := sameJob(r, req.Job); err != nil {
		return nil, err
	}
	_, warnings, err := s.checkJob(r, req.Job, nil)
	reply := &api.JobValidateResponse{DriverConfigValidated: true, Warnings: warnings}
	var faults jobspec.Faults
	switch {
	case errors.As(err, &faults):
		reply.Error, reply.ValidationErrors = err.Error(), faults.Strings()
	case err != nil:
		return nil, err
	}
	return reply, nil
}

func (s *Server) parseJob(r *request) (any, error) {
	var req api.JobsParseRequest
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if req.JobHCL == "" {
		return nil, badRequest("Job spec is empty")
	}
	j, _, err := jobspec.Parse("input.hcl", []byte(req.JobHCL), jobspec.ParseOptions{VarContent: req.Variables})
	if err != nil {
		return nil, badRequest("Failed to parse job: %v", err)
	}
	if req.Canonicalize {
		j.Canonicalize()
	}
	return j, nil
}

func (s *Server) evaluateJob(r *request) (any, error) {
	var req struct {
		JobID       string
		EvalOptions struct{ ForceReschedule bool }
	}
	err := r.decode(&req)
	if errors.Is(err, errEmpty) { // a body may be left out
		req.JobID, err = r.params["job"], nil
	}
	if err != nil {
		return nil, err
	}
	if err := bodyJob(r, req.JobID); err != nil {
		return nil, err
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	snap := s.cfg.Store.State().Snapshot()
	j := snap.Job(nil, r.jobKey())
	switch {
	case j == nil:
		return nil, refused(notFound("job not found"))
	case j.Parameterized():
		return nil, refused(badRequest("can't evaluate parameterized job"))
	case j.Spawns():
		return nil, refused(badRequest("can't evaluate periodic job"))
	}
	yes := true
	cmd := &cluster.UpdateTransitions{
		Transitions: map[string]cluster.DesiredTransition{},
		Evals:       []*cluster.Evaluation{newEval(j, cluster.TriggerJobRegister)},
	}
	for _, a := range snap.AllocsByJob(nil, j.Key()) {
		if req.EvalOptions.ForceReschedule && a.ClientStatus == cluster.AllocClientFailed && !a.ServerTerminal() && a.NextAllocation == "" {
			cmd.Transitions[a.ID] = cluster.DesiredTransition{ForceReschedule: &yes}
		}
	}
	res, err := s.cfg.Store.Apply(r.Context(), cmd)
	if err != nil {
		return nil, refused(err)
	}
	res.EvalID, res.JobModifyIndex = cmd.Evals[0].ID, j.JobModifyIndex
	return wrote(res, ""), nil
}

// newEval makes a pending evaluation of a job.
func newEval(j *cluster.Job, trigger string) *cluster.Evaluation {
	return &cluster.Evaluation{
		ID: newID(), Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Priority: j.Priority,
		TriggeredBy: trigger, JobModifyIndex: j.JobModifyIndex, Status: cluster.EvalStatusPending,
	}
}

// bodyJob compares the job that a body names with the route's.
func bodyJob(r *request, id string) error {
	switch id {
	case "":
		return badRequest("Job ID must be specified")
	case r.params["job"]:
		return nil
	}
	return badRequest("JobID not same as job name")
}

func (s *Server) revertJob(r *request) (any, error) {
	var req struct {
		JobID               string
		JobVersion          uint64
		EnforcePriorVersion *uint64
	}
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if err := bodyJob(r, req.JobID); err != nil {
		return nil, err
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	snap, key := s.cfg.Store.State().Snapshot(), r.jobKey()
	current, target := snap.Job(nil, key), snap.JobVersion(nil, key, req.JobVersion)
	switch {
	case current == nil:
		return nil, refused(notFound("job %q not found", key.ID))
	case req.JobVersion == current.Version:
		return nil, refusedf("can't revert to current version")
	case req.EnforcePriorVersion != nil && *req.EnforcePriorVersion != current.Version:
		return nil, refusedf("Current job has version %d; enforcing version %d", current.Version, *req.EnforcePriorVersion)
	case target == nil:
		return nil, refusedf("job %q in namespace %q at version %d not found", key.ID, key.Namespace, req.JobVersion)
	}
	j := cluster.Clone(target)
	j.Stop = false
	if err := j.Detach(); err != nil {
		return nil, err
	}
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.RegisterJob{
		Job: j, Submission: snap.Submission(nil, key, req.JobVersion),
		EnforceIndex: true, JobModifyIndex: current.JobModifyIndex, EvalID: newID(),
	})
	if err != nil {
		return nil, refused(err)
	}
	return wrote(res, ""), nil
}

func (s *Server) setStable(r *request) (any, error) {
	var req struct {
		JobID      string
		JobVersion uint64
		Stable     bool
	}
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if err := bodyJob(r, req.JobID); err != nil {
		return nil, err
	}
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.SetJobStability{
		Namespace: r.namespace, JobID: r.params["job"], Version: req.JobVersion, Stable: req.Stable,
	})
	if err != nil {
		return nil, refused(err)
	}
	return &answer{body: struct{ JobModifyIndex, Index uint64 }{res.Index, res.Index}, index: res.Index}, nil
}
