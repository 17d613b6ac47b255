package api

import (
	"context"
	"net/http"
	"net/url"

	nomad "github.com/hashicorp/nomad/api"
)

// Registered is the answer to a registration or a stop. EvalID is empty where nothing is to be evaluated: a job that
// runs when it is dispatched, or at its times.
type Registered struct {
	EvalID         string
	JobModifyIndex uint64
	Warnings       string
}

// RegisterJob submits a job together with its source, so that the server names
// faults by line and keeps the text.
func (c *Client) RegisterJob(ctx context.Context, job *nomad.Job, source *nomad.JobSubmission) (*Registered, error) {
	out := new(Registered)
	in := nomad.JobRegisterRequest{Job: job, Submission: source}
	return out, c.call(ctx, http.MethodPut, []string{"jobs"}, in, out)
}

// StopJob stops a job; purge forgets it whole. JobModifyIndex is 0 when there is no such job; EvalID is empty then,
// and where there is nothing to evaluate: a job whose work is done by its children, which go on.
func (c *Client) StopJob(ctx context.Context, id string, purge bool) (*Registered, error) {
	query := url.Values{}
	if purge {
		query.Set("purge", "true")
	}
	res, err := c.do(ctx, http.MethodDelete, []string{"job", id}, query, nil, 0)
	if err != nil {
		return nil, err
	}
	out := new(Registered)
	return out, answered(res, out)
}

// Jobs lists the jobs of the default namespace whose ID begins with prefix.
func (c *Client) Jobs(ctx context.Context, prefix string) ([]*nomad.JobListStub, error) {
	var out []*nomad.JobListStub
	return out, c.get(ctx, []string{"jobs"}, url.Values{"prefix": {prefix}}, &out)
}

// Job gives the current version of a job.
func (c *Client) Job(ctx context.Context, id string) (*nomad.Job, error) {
	out := new(nomad.Job)
	return out, c.get(ctx, []string{"job", id}, nil, out)
}

// JobAllocations lists a job's allocations.
func (c *Client) JobAllocations(ctx context.Context, id string) ([]*nomad.AllocationListStub, error) {
	var out []*nomad.AllocationListStub
	return out, c.get(ctx, []string{"job", id, "allocations"}, nil, &out)
}

// JobDeployment gives a job's newest deployment, nil when it has none.
func (c *Client) JobDeployment(ctx context.Context, id string) (*nomad.Deployment, error) {
	var out *nomad.Deployment
	return out, c.get(ctx, []string{"job", id, "deployment"}, nil, &out)
}

// Evaluation gives an evaluation.
func (c *Client) Evaluation(ctx context.Context, id string) (*nomad.Evaluation, error) {
	out := new(nomad.Evaluation)
	return out, c.get(ctx, []string{"evaluation", id}, nil, out)
}

// Deployment gives a deployment.
func (c *Client) Deployment(ctx context.Context, id string) (*nomad.Deployment, error) {
	out := new(nomad.Deployment)
	return out, c.get(ctx, []string{"deployment", id}, nil, out)
}

func (c *Client) get(ctx context.Context, path []string, query url.Values, out any) error {
	res, err := c.do(ctx, http.MethodGet, path, query, nil, 0)
	if err != nil {
		return err
	}
	return answered(res, out)
}

// AllocationStub is what lists say of an allocation.
type AllocationStub = nomad.AllocationListStub
