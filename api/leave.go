package api

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// Statuses of a Peer.
const (
	peerAlive  = "alive"
	peerFailed = "failed"
)

// forceLeave takes the servers of a name out of the region that have failed, as
// `nomad server force-leave` asks; with prune they are forgotten as well. A name that
// nobody has is no error, as with Nomad. A server that is there must leave by itself.
func (s *Server) forceLeave(r *request) (any, error) {
	name := r.query.Get("node")
	if name == "" {
		return nil, badRequest("missing node to force leave")
	}
	prune, err := r.flag("prune", true)
	if err != nil {
		return nil, err
	}
	if err := s.fresh(r); err != nil {
		return nil, err
	}
	peers, _, err := s.peers()
	if err != nil {
		return nil, err
	}
	named := slices.DeleteFunc(peers, func(p Peer) bool { return p.ID != name && p.Name != name && s.fullName(p) != name })
	gone := false
	var faults []error
	for _, p := range named {
		if p.Status == peerAlive {
			continue
		}
		gone = true
		if p.Status == peerFailed {
			err := s.cfg.Servers.Remove(r.Context(), p.ID)
			if cluster.CodeOf(err) != cluster.CodeNotFound {
				faults = append(faults, err)
			}
		}
		if prune && errors.Join(faults...) == nil {
			_, err := s.cfg.Store.Apply(r.Context(), &cluster.RemoveServer{ID: p.ID})
			faults = append(faults, err)
		}
	}
	if len(named) > 0 && !gone {
		return nil, refusedf("server %s is alive: take it out with rxvision server leave %s", name, named[0].Name)
	}
	return nil, refused(errors.Join(faults...))
}

// leave takes this server out of its region; it ends when the answer is out.
func (s *Server) leave(r *request) (any, error) {
	if s.cfg.Servers == nil {
		return nil, notBuilt("this server does not know its peers")
	}
	return nil, s.cfg.Servers.Leave(r.Context())
}

// Leave takes the server that is asked out of its region. It ends then.
func (c *Client) Leave(ctx context.Context) error {
	return c.call(ctx, http.MethodPut, []string{"agent", "leave"}, nil, nil)
}

// ServerAddr gives the address of the HTTP API of the living server of that name,
// NAME or NAME.REGION, by the protocol that c speaks.
func (c *Client) ServerAddr(ctx context.Context, name string) (string, error) {
	var reply membersReply
	if err := c.call(ctx, http.MethodGet, []string{"agent", "members"}, nil, &reply); err != nil {
		return "", err
	}
	for _, m := range reply.Members {
		short, _, _ := strings.Cut(m.Name, ".")
		if m.Status == peerAlive && (m.Name == name || short == name) {
			scheme, _, _ := strings.Cut(c.addr, "://")
			return (&url.URL{Scheme: scheme, Host: m.Tags["http_addr"]}).String(), nil
		}
	}
	return "", cluster.Errorf(cluster.CodeNotFound, "no server of that name is alive: %s", name)
}
