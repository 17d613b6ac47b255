package api

import (
	"context"
	"net/http"

	"github.com/rxvision/rxvision/cluster"
)

// Hold is why nothing is replaced for now: many nodes fell silent at once.
type Hold struct {
	Held        bool
	Since       cluster.Time // when it began
	Nodes, Of   int          // silent nodes when it began, and those that were ready before
	Silent      int          // nodes that are disconnected now
	Reason      string
	ModifyIndex uint64
}

func (s *Server) readHold(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		out := &Hold{}
		if h := snap.FleetHold(ws); h != nil {
			*out = Hold{Held: true, Since: h.Since, Nodes: h.Nodes, Of: h.Of, Reason: h.Reason, ModifyIndex: h.ModifyIndex}
		}
		for _, n := range snap.Nodes(ws, "") {
			if n.Status == cluster.NodeStatusDisconnected {
				out.Silent++
			}
		}
		return found{body: out, index: max(snap.Index(ws, cluster.TableFleetHold), snap.Index(ws, cluster.TableNodes))}
	})
}

// releaseHold lets replacements go on. Without a hold it changes nothing.
func (s *Server) releaseHold(r *request) (any, error) {
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.SetFleetHold{})
	if err != nil {
		return nil, err
	}
	return &answer{index: res.Index}, nil
}

// Hold tells whether replacements pause, and why.
func (c *Client) Hold(ctx context.Context) (*Hold, error) {
	out := new(Hold)
	if err := c.call(ctx, http.MethodGet, []string{"operator", "hold"}, nil, out); err != nil {
		return nil, err
	}
	return out, nil
}

// ReleaseHold lets replacements go on: nodes that are still silent count as down, and
// what ran there is replaced.
func (c *Client) ReleaseHold(ctx context.Context) error {
	return c.call(ctx, http.MethodDelete, []string{"operator", "hold"}, nil, nil)
}
