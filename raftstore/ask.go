package raftstore

import (
	"context"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore/pb"
)

// Answerer answers questions about what a leader keeps beside the state, such as the order of its queue. It is called on
// the leader only, by several at a time. Its errors keep their code of package cluster; with CodeNoLeader the question is
// asked again, of whoever leads then.
type Answerer func(ctx context.Context, question []byte) ([]byte, error)

// Answer says who answers here what is asked by Ask, from now on.
func (s *Store) Answer(by Answerer) { s.answers.Store(&by) }

// Ask has the leader answer a question. Errors are those of the Answerer and, but for its refusals, of Apply; a server
// that does not know such questions answers CodeUnsupported.
func (s *Store) Ask(ctx context.Context, question []byte) ([]byte, error) {
	end, err := s.begin()
	if err != nil {
		return nil, err
	}
	defer end()
	return byLeader(ctx, s,
		func() ([]byte, error) { return s.askHere(ctx, question) },
		func(ctx context.Context, _ string, c pb.PeersClient) ([]byte, error) {
			reply, err := c.Ask(ctx, &pb.Question{Body: question})
			return reply.GetBody(), err
		})
}

func (s *Store) askHere(ctx context.Context, question []byte) ([]byte, error) {
	by := s.answers.Load()
	if by == nil {
		return nil, cluster.Errorf(cluster.CodeUnsupported, "this server answers no questions")
	}
	return (*by)(ctx, question)
}
