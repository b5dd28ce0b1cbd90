"""What people read: results, studies, pages."""
