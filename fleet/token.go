package fleet

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

// maxRules bounds the policies of one token that a gateway is told, in bytes.
const maxRules = MaxMessage / 2

// ResolveToken implements pb.FleetServer. Policies are looked up at each call, so
// that a gateway hears of their changes when it next asks.
func (s *Server) ResolveToken(ctx context.Context, req *pb.ResolveTokenRequest) (*pb.ResolveTokenReply, error) {
	if _, err := s.identify(ctx, "ResolveToken"); err != nil {
		return nil, err
	}
	snap := s.cfg.Store.State().Snapshot()
	if req.SecretHash == "" {
		return tokenReply(snap, &cluster.ACLToken{Policies: []string{cluster.ACLAnonymousPolicy}})
	}
	token := snap.ACLTokenBySecret(nil, req.SecretHash)
	if token == nil {
		if err := s.caught.wait(ctx); err != nil { // it may have been made at another server just now
			return nil, toStatus(err)
		}
		snap = s.cfg.Store.State().Snapshot()
		token = snap.ACLTokenBySecret(nil, req.SecretHash)
	}
	if token == nil || token.Expired(time.Now().UnixNano()) {
		return &pb.ResolveTokenReply{}, nil
	}
	return tokenReply(snap, token)
}

// tokenReply tells what a token gives; policies that are not there give nothing.
func tokenReply(snap *cluster.Snapshot, token *cluster.ACLToken) (*pb.ResolveTokenReply, error) {
	reply := &pb.ResolveTokenReply{
		Found: true, Management: token.Type == cluster.ACLTokenManagement, Expires: token.ExpirationTime, Accessor: token.AccessorID,
	}
	size := 0
	for _, name := range token.Policies {
		p := snap.ACLPolicy(nil, name)
		if p == nil {
			continue
		}
		if size += len(p.Rules); size > maxRules {
			return nil, status.Errorf(codes.ResourceExhausted, "the policies of token %s have more than %d bytes", token.AccessorID, maxRules)
		}
		reply.Rules = append(reply.Rules, p.Rules)
	}
	return reply, nil
}
