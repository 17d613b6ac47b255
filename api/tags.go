package api

import (
	"errors"

	"github.com/rxvision/rxvision/cluster"
)

// tagVersion names a version of a job, the current one unless another is asked for.
func (s *Server) tagVersion(r *request) (any, error) {
	var req struct {
		Name        string
		Description string
		Version     *uint64
	}
	if err := r.decode(&req); err != nil && !errors.Is(err, errEmpty) {
		return nil, err
	}
	if req.Name != "" && req.Name != r.params["tag"] {
		return nil, badRequest("the tag's name in the body, %q, is not that of the request, %q", req.Name, r.params["tag"])
	}
	return s.tag(r, &cluster.TagVersion{Description: req.Description, Version: req.Version})
}

func (s *Server) untagVersion(r *request) (any, error) {
	return s.tag(r, &cluster.TagVersion{Unset: true})
}

func (s *Server) tag(r *request, cmd *cluster.TagVersion) (any, error) {
	cmd.Namespace, cmd.JobID, cmd.Name = r.namespace, r.params["job"], r.params["tag"]
	res, err := s.cfg.Store.Apply(r.Context(), cmd)
	if err != nil {
		return nil, refused(err)
	}
	return &answer{body: struct {
		Name, Description string
		Index             uint64
	}{cmd.Name, cmd.Description, res.Index}, index: res.Index}, nil
}
