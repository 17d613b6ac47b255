package api

import (
	"slices"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

func deploymentPage(r *request, snap *cluster.Snapshot, ws cluster.WatchSet, list []*cluster.Deployment) found {
	at := func(d *cluster.Deployment) position { return created(d.CreateIndex, d.ID) }
	same := func(d *cluster.Deployment) any { return d }
	list = seen(r, acl.ReadJob, list, deploymentNamespace)
	return page(r, snap.Index(ws, cluster.TableDeployments), list, false, at, same, same)
}

func deploymentNamespace(d *cluster.Deployment) string { return d.Namespace }

func (s *Server) listDeployments(r *request) (any, error) {
	prefix, err := r.idPrefix("deployment")
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		list := inNamespace(r, snap.Deployments(ws, prefix), deploymentNamespace)
		return deploymentPage(r, snap, ws, list)
	})
}

func (s *Server) readDeployment(r *request) (any, error) {
	id, err := wholeUUID(r.params["id"], "deployment")
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		d := snap.Deployment(ws, id)
		if d == nil {
			return missing(snap, ws, cluster.TableDeployments, "deployment not found")
		}
		if err := r.allow(d.Namespace, ""); err != nil {
			return found{index: d.ModifyIndex, err: err}
		}
		return found{body: d, index: d.ModifyIndex}
	})
}

func (s *Server) deploymentAllocs(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		return allocPage(r, snap, ws, snap.AllocsByDeployment(ws, r.params["id"]), allocFields{states: true})
	})
}

// deploymentReply is the answer to changes of a deployment.
type deploymentReply struct {
	EvalID                string
	EvalCreateIndex       uint64
	DeploymentModifyIndex uint64
	RevertedJobVersion    *uint64
	Index                 uint64
}

// activeDeployment finds the deployment of a request to change it; verb is for
// the message when it has ended.
func (s *Server) activeDeployment(r *request, verb string) (*cluster.Deployment, error) {
	id, err := wholeUUID(r.params["id"], "deployment")
	if err != nil {
		return nil, err
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	d := s.cfg.Store.State().Snapshot().Deployment(nil, id)
	if d == nil {
		return nil, notFound("deployment not found")
	}
	if err := r.allow(d.Namespace, ""); err != nil {
		return nil, err
	}
	if !d.Active() {
		return nil, refusedf("can't %s terminal deployment", verb)
	}
	return d, nil
}

// updateDeployment sets a deployment's status; evaluate asks for an evaluation too.
func (s *Server) updateDeployment(r *request, d *cluster.Deployment, status, description string, evaluate bool) (any, error) {
	cmd := &cluster.UpdateDeployment{Update: &cluster.DeploymentStatusUpdate{
		DeploymentID: d.ID, Status: status, StatusDescription: description,
	}}
	if evaluate {
		cmd.EvalID = newID()
	}
	res, err := s.cfg.Store.Apply(r.Context(), cmd)
	if err != nil {
		return nil, refused(err)
	}
	return deploymentWrote(res), nil
}

// deploymentWrote answers a change of a deployment.
func deploymentWrote(res cluster.Result) *answer {
	reply := &deploymentReply{EvalID: res.EvalID, DeploymentModifyIndex: res.Index, RevertedJobVersion: res.Reverted, Index: res.Index}
	if res.EvalID != "" {
		reply.EvalCreateIndex = res.Index
	}
	return &answer{body: reply, index: res.Index}
}

func (s *Server) failDeployment(r *request) (any, error) {
	d, err := s.activeDeployment(r, "fail")
	if err != nil {
		return nil, err
	}
	return s.updateDeployment(r, d, cluster.DeploymentFailed, cluster.DeploymentDescFailedByUser, true)
}

func (s *Server) pauseDeployment(r *request) (any, error) {
	var req struct {
		DeploymentID string
		Pause        bool
	}
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	verb := "resume"
	if req.Pause {
		verb = "pause"
	}
	d, err := s.activeDeployment(r, verb)
	if err != nil {
		return nil, err
	}
	if req.Pause {
		return s.updateDeployment(r, d, cluster.DeploymentPaused, cluster.DeploymentDescPaused, false)
	}
	return s.updateDeployment(r, d, cluster.DeploymentRunning, cluster.DeploymentDescRunning, true)
}

func (s *Server) promoteDeployment(r *request) (any, error) {
	var req struct {
		DeploymentID string
		All          bool
		Groups       []string
	}
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	d, err := s.activeDeployment(r, "promote")
	switch {
	case err != nil:
		return nil, err
	case req.All && len(req.Groups) > 0:
		return nil, badRequest("promote all groups or those that are named, not both")
	case !req.All && len(req.Groups) == 0:
		return nil, badRequest("name the groups to promote, or ask for all")
	}
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.PromoteDeployment{DeploymentID: d.ID, Groups: req.Groups, EvalID: newID()})
	if err != nil {
		return nil, refused(err)
	}
	return deploymentWrote(res), nil
}

// setHealth takes over an operator's judgement of allocations (health_check = "manual").
func (s *Server) setHealth(r *request) (any, error) {
	var req struct {
		DeploymentID           string
		HealthyAllocationIDs   []string
		UnhealthyAllocationIDs []string
	}
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	d, err := s.activeDeployment(r, "set health of allocations for")
	switch {
	case err != nil:
		return nil, err
	case len(req.HealthyAllocationIDs)+len(req.UnhealthyAllocationIDs) == 0:
		return nil, badRequest("must specify at least one healthy/unhealthy allocation ID")
	}
	for _, id := range req.HealthyAllocationIDs {
		if slices.Contains(req.UnhealthyAllocationIDs, id) {
			return nil, badRequest("allocation %s cannot be both healthy and unhealthy", id)
		}
	}
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.UpdateDeployment{
		Update:  &cluster.DeploymentStatusUpdate{DeploymentID: d.ID},
		Healthy: req.HealthyAllocationIDs, Unhealthy: req.UnhealthyAllocationIDs, EvalID: newID(),
	})
	if err != nil {
		return nil, refused(err)
	}
	return deploymentWrote(res), nil
}

func (s *Server) unblockDeployment(r *request) (any, error) {
	if _, err := s.activeDeployment(r, "unblock"); err != nil {
		return nil, err
	}
	return nil, refusedf("can't unblock running deployment")
}
