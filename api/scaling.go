package api

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/jobspec"
)

func (s *Server) scaleJob(r *request) (any, error) {
	var req api.ScalingRequest
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	switch {
	case req.Target["Job"] != "" && req.Target["Job"] != r.params["job"]:
		return nil, badRequest("JobID not same as job name")
	case req.Count != nil && (*req.Count < 0 || *req.Count > jobspec.MaxCount):
		return nil, badRequest("count %d is not within 0 and %d", *req.Count, jobspec.MaxCount)
	}
	cmd := &cluster.ScaleJob{
		Namespace: r.namespace, JobID: r.params["job"], Group: req.Target["Group"], Count: req.Count,
		Message: req.Message, Error: req.Error, JobModifyIndex: req.JobModifyIndex, EvalID: newID(),
	}
	if len(req.Meta) > 0 {
		meta, err := json.Marshal(req.Meta)
		if err != nil {
			return nil, badRequest("meta cannot be kept: %v", err)
		}
		cmd.Meta = meta
	}
	res, err := s.cfg.Store.Apply(r.Context(), cmd)
	switch cluster.CodeOf(err) {
	case cluster.CodeInvalid, cluster.CodeNotFound: // with their own statuses, unlike most
		return nil, err
	}
	if err != nil {
		return nil, refused(err)
	}
	return wrote(res, ""), nil
}

// scaleGroup is one group in the answer of scaleStatus.
type scaleGroup struct {
	Desired, Placed, Running, Healthy, Unhealthy int
	Events                                       []*scalingEvent
}

// scalingEvent is an event under the field names of Nomad's API.
type scalingEvent struct {
	*cluster.ScalingEvent
	EvalID *string
}

type scaleReply struct {
	JobID, Namespace               string
	JobStopped                     bool
	JobCreateIndex, JobModifyIndex uint64
	TaskGroups                     map[string]*scaleGroup
}

func (s *Server) scaleStatus(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		j := snap.Job(ws, r.jobKey())
		if j == nil {
			return missing(snap, ws, cluster.TableJobs, "job not found")
		}
		reply := &scaleReply{
			JobID: j.ID, Namespace: j.Namespace, JobStopped: j.Stop, JobCreateIndex: j.CreateIndex,
			JobModifyIndex: j.JobModifyIndex, TaskGroups: map[string]*scaleGroup{},
		}
		index := max(j.ModifyIndex, snap.Index(ws, cluster.TableAllocs))
		scaling := snap.Scaling(ws, j.Key())
		if scaling != nil {
			index = max(index, scaling.ModifyIndex)
		}
		for _, g := range j.TaskGroups {
			reply.TaskGroups[g.Name] = &scaleGroup{Desired: g.Count, Events: []*scalingEvent{}}
			if scaling == nil || scaling.Groups[g.Name] == nil {
				continue
			}
			for _, e := range scaling.Groups[g.Name].Events {
				shown := &scalingEvent{ScalingEvent: e}
				if e.EvalID != "" {
					shown.EvalID = &e.EvalID
				}
				reply.TaskGroups[g.Name].Events = append(reply.TaskGroups[g.Name].Events, shown)
			}
		}
		for _, a := range snap.AllocsByJob(ws, j.Key()) {
			g := reply.TaskGroups[a.TaskGroup]
			if g == nil || a.Terminal() || a.JobCreateIndex != j.CreateIndex {
				continue
			}
			g.Placed++
			if a.ClientStatus == cluster.AllocClientRunning {
				g.Running++
			}
			if d := a.DeploymentStatus; d != nil && d.Healthy != nil {
				if *d.Healthy {
					g.Healthy++
				} else {
					g.Unhealthy++
				}
			}
		}
		return found{body: reply, index: index}
	})
}

// scalingPolicy is the policy of a group as Nomad's API shows it.
type scalingPolicy struct {
	ID          string
	Namespace   string
	Type        string
	Enabled     bool
	Min, Max    int64
	Policy      json.RawMessage
	Target      map[string]string
	CreateIndex uint64
	ModifyIndex uint64

	// What Nomad does not have: how the leader found a policy of its own autoscaler, see cluster.ScalingStatus.
	Status            string `json:",omitempty"`
	StatusDescription string `json:",omitempty"`
	Wanted            *int   `json:",omitempty"` // the count that it came to
	own               bool   // it is for our autoscaler
}

// scalingPolicies are those of the jobs of a namespace that are not stopped.
func scalingPolicies(snap *cluster.Snapshot, ws cluster.WatchSet, namespace, prefix string) (list []*scalingPolicy) {
	for _, j := range snap.Jobs(ws, namespace, "") {
		for _, g := range j.TaskGroups {
			id := cluster.ScalingPolicyID(j.Key(), g.Name)
			if p := g.Scaling; p != nil && !j.Stop && strings.HasPrefix(id, prefix) {
				list = append(list, &scalingPolicy{
					ID: id, Namespace: j.Namespace, Type: p.Type, Enabled: p.Enabled, Min: p.Min, Max: p.Max, Policy: p.Policy,
					Target:      map[string]string{"Namespace": j.Namespace, "Job": j.ID, "Group": g.Name},
					CreateIndex: j.CreateIndex, ModifyIndex: j.JobModifyIndex, own: len(p.Checks) > 0,
				})
			}
		}
	}
	return list
}

func (s *Server) listScalingPolicies(r *request) (any, error) {
	job, kind := r.query.Get("job"), r.query.Get("type")
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		list := only(scalingPolicies(snap, ws, r.namespace, r.prefix), func(p *scalingPolicy) bool {
			may := func(c acl.Capability) bool { return r.may(c, p.Namespace, "") }
			return (job == "" || p.Target["Job"] == job) && (kind == "" || p.Type == kind) && r.satisfied(may) == nil
		})
		at := func(p *scalingPolicy) position { return created(p.CreateIndex, p.ID) }
		same := func(p *scalingPolicy) any { return p }
		return page(r, snap.Index(ws, cluster.TableJobs), list, false, at, same, same)
	})
}

// statusWait is how long the leader may take to say how a policy fares.
const statusWait = 2 * time.Second

func (s *Server) readScalingPolicy(r *request) (any, error) {
	out, err := s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		for _, p := range scalingPolicies(snap, ws, r.namespace, r.params["id"]) {
			if p.ID == r.params["id"] {
				return found{body: p, index: p.ModifyIndex}
			}
		}
		return missing(snap, ws, cluster.TableJobs, "policy not found")
	})
	if a, ok := out.(*answer); ok && err == nil {
		if p, ok := a.body.(*scalingPolicy); ok && p.own && s.cfg.Autoscaler != nil {
			s.tellStatus(r.Context(), p)
		}
	}
	return out, err
}

// tellStatus adds how a policy fares. That it cannot be known is told too, and no reason to keep the rest back.
func (s *Server) tellStatus(ctx context.Context, p *scalingPolicy) {
	if !p.Enabled {
		p.Status, p.StatusDescription = cluster.ScalingDisabled, "enabled is false"
		return
	}
	ctx, cancel := context.WithTimeout(ctx, statusWait)
	defer cancel()
	switch status, err := s.cfg.Autoscaler.ScalingStatus(ctx, p.ID); {
	case err != nil:
		p.Status, p.StatusDescription = cluster.ScalingUnknown, "the leader does not say: "+err.Error()
	case status == nil:
		p.Status, p.StatusDescription = cluster.ScalingUnknown, "the leader has not looked at it yet"
	default:
		p.Status, p.StatusDescription, p.Wanted = status.State, status.Reason, &status.Count
	}
}
