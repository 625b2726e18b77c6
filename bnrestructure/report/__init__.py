"""What people read: tables of plans and verifications, pictures of graphs, the environment. Reports change nothing."""
